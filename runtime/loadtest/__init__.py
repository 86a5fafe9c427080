"""`osp bench load`: puts servers under load, one against another, and says what that cost in quality."""
