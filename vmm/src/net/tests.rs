//! Taps in a network namespace of their own.
