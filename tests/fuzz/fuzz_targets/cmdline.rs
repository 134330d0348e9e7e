//! A command line: arguments are separated by line feeds. It is refused in one line of text, or is a VM that is valid.
#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use libfuzzer_sys::fuzz_target;
use vmm::config::cmdline::{self, Request};

fuzz_target!(|data: &[u8]| {
    let arguments = data.split(|byte| *byte == b'\n').map(|a| OsString::from_vec(a.to_vec()));
    match cmdline::parse(arguments) {
        Ok(Request::Run(config)) => {
            config.validate().expect("what was parsed is valid");
        }
        Ok(_) => {}
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
