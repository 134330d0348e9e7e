//! Why a configuration cannot become a VM: the one error of all its rules.

/// One line that says which part, what is wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidConfig(String);

pub(super) fn bad<T>(message: impl Into<String>) -> Result<T, InvalidConfig> {
    Err(InvalidConfig(message.into()))
}
