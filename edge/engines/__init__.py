"""TensorRT engines: built on the device from a bundle's graphs, and kept beside the bundle as a cache.

Owns everything between a bundle and an engine that may be loaded. How an engine is run is `backends.tensorrt`'s.
"""
