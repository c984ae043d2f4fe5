"""The page about a run or a ladder, made from the files that it has left."""
