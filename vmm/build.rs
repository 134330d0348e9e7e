//! How the program is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // The addresses that the loader adjusts, as a bitmap (RELR, glibc 2.36 and newer): a hundred KiB less to read at each start.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
