"""The peers' C++ helpers and what compiles them."""
