"""Processes, persistence and statistics of training, under the names that EDM's network files refer to.

`distributed`: processes and devices; `persistence`: classes whose source travels in pickles; `training_stats`: figures
summed over steps and processes; `misc`: precision, files of tensors.
"""
