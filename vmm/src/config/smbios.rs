//! What the guest's SMBIOS tables are told to say.

/// `-smbios type=TABLE,KEY=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmbiosText {
    /// Type of the table.
    pub table: u8,
    /// Which of its texts.
    pub key: &'static str,
    /// Printable ASCII; a decimal number for a speed.
    pub value: String,
}
