"""How good are the images? Fréchet distances between sets of images, in the features of a detector.

`detectors` turns images into features (Inception-v3, or a small classifier of one's own), `statistics` turns features
into means and covariances, `frechet` compares those.
"""
