//! What can go wrong with a request: one enum for the whole fleet, clonable because a job's error is told to several listeners.
//! The D-Bus room maps it to the API's named errors.

/// Why a request was refused or failed. The text says what was wrong and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FleetError {
    /// No such VM.
    #[error("{0}")]
    NoSuchVm(String),
    /// The name or uuid is taken.
    #[error("{0}")]
    VmExists(String),
    /// No such network.
    #[error("{0}")]
    NoSuchNetwork(String),
    /// The network's name or bridge is taken.
    #[error("{0}")]
    NetworkExists(String),
    /// No such template.
    #[error("{0}")]
    NoSuchTemplate(String),
    /// The template's name is taken.
    #[error("{0}")]
    TemplateExists(String),
    /// VMs or templates need the template.
    #[error("{0}")]
    TemplateInUse(String),
    /// No such job, or it has ended.
    #[error("{0}")]
    NoSuchJob(String),
    /// The definition is wrong.
    #[error("{0}")]
    InvalidSpec(String),
    /// Somebody changed the definition in between.
    #[error("{0}")]
    GenerationMismatch(String),
    /// The VM's state does not allow it.
    #[error("{0}")]
    InvalidState(String),
    /// Another job is under way.
    #[error("{0}")]
    Busy(String),
    /// The host has no more of something.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The VMM did not answer in time.
    #[error("{0}")]
    QmpTimeout(String),
    /// The VMM refused.
    #[error("{0}")]
    QmpError(String),
    /// The VMM ended.
    #[error("{0}")]
    VmmDied(String),
    /// This VMM or this version cannot do it.
    #[error("{0}")]
    NotSupported(String),
    /// No process came to be.
    #[error("{0}")]
    LaunchFailed(String),
    /// Bridge or tap.
    #[error("{0}")]
    NetworkFailed(String),
    /// The store.
    #[error("{0}")]
    StoreFailed(String),
    /// The host starts nothing.
    #[error("{0}")]
    Draining(String),
    /// A later request overtook it.
    #[error("{0}")]
    Cancelled(String),
}

impl FleetError {
    /// The same error with another text.
    #[must_use]
    pub fn map(self, change: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::NoSuchVm(text) => Self::NoSuchVm(change(text)),
            Self::VmExists(text) => Self::VmExists(change(text)),
            Self::NoSuchNetwork(text) => Self::NoSuchNetwork(change(text)),
            Self::NetworkExists(text) => Self::NetworkExists(change(text)),
            Self::NoSuchTemplate(text) => Self::NoSuchTemplate(change(text)),
            Self::TemplateExists(text) => Self::TemplateExists(change(text)),
            Self::TemplateInUse(text) => Self::TemplateInUse(change(text)),
            Self::NoSuchJob(text) => Self::NoSuchJob(change(text)),
            Self::InvalidSpec(text) => Self::InvalidSpec(change(text)),
            Self::GenerationMismatch(text) => Self::GenerationMismatch(change(text)),
            Self::InvalidState(text) => Self::InvalidState(change(text)),
            Self::Busy(text) => Self::Busy(change(text)),
            Self::ResourceExhausted(text) => Self::ResourceExhausted(change(text)),
            Self::QmpTimeout(text) => Self::QmpTimeout(change(text)),
            Self::QmpError(text) => Self::QmpError(change(text)),
            Self::VmmDied(text) => Self::VmmDied(change(text)),
            Self::NotSupported(text) => Self::NotSupported(change(text)),
            Self::LaunchFailed(text) => Self::LaunchFailed(change(text)),
            Self::NetworkFailed(text) => Self::NetworkFailed(change(text)),
            Self::StoreFailed(text) => Self::StoreFailed(change(text)),
            Self::Draining(text) => Self::Draining(change(text)),
            Self::Cancelled(text) => Self::Cancelled(change(text)),
        }
    }
}
