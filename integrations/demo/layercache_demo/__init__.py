"""The weights of layercache's demonstration model: this folder's files, read by `layercache.demo.pipeline`."""
