"""The bundled models, one directory each, shipped as package data: `demo` (W4A4) and `demo-16bit`."""
