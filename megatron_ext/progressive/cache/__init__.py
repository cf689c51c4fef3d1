"""The frozen trunk (the layers trained earlier), and the cache of its outputs."""
