//! For the fuzz targets only: the configuration space, without the kernel's side of the device.

/// Reads it.
pub fn read_config(cid: u32, offset: u64, data: &mut [u8]) {
    super::read_address(u64::from(cid), offset, data);
}
