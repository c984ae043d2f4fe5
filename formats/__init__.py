"""Files: networks (EDM's pickles, safetensors), training states, generated images. Foreign files are read as data."""
