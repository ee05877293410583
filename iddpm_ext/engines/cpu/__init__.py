"""The CPU engine: a network as a plan of rows, run by one call into `csrc/unet_engine`."""
