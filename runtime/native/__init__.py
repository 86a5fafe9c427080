"""The native engine: C++ in `src/`, compiled to `_osp`."""
