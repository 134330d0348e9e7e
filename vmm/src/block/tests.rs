//! Opening, locking and bouncing on real files.
