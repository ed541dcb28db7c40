"""Our own small torch modules, written to be exported.

Parameters bear the checkpoint's leaf names, so that a prefix is all that lies between the two. They are built on the
meta device: shapes and dtypes without memory.
"""
