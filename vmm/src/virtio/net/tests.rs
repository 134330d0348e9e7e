//! The network device against a socket pair.
