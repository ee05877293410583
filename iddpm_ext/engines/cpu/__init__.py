"""The CPU engine: a network as a list of operations, run by one call into `csrc/unet_engine`."""
