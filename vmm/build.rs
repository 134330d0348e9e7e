//! How the program is linked.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The addresses that the loader adjusts, as a bitmap (RELR, glibc 2.36 and newer): a hundred KiB less to read at each start.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // The code that every start runs stands together; the file says why.
    let here = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let layout = Path::new(&here).join("layout.ld");
    println!("cargo::rerun-if-changed=layout.ld");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", layout.display());
}
