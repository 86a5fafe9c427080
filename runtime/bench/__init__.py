"""`osp bench`: how fast the native engine is on this machine, beside what the machine can do."""
