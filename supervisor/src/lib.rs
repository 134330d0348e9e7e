//! placeholder

pub mod qmp;
