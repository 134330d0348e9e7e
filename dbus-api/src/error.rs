//! The named errors of the API: `org.flotilla.Flotilla1.Error.*`. The name is stable; the text says what was wrong and what to do.

/// An error as a client sees it. Every variant carries its message.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.flotilla.Flotilla1.Error")]
pub enum Error {
    /// Trouble on the bus itself.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// No VM of that name, uuid or path.
    NoSuchVm(String),
    /// A VM of that name is defined already.
    VmExists(String),
    /// No network of that name.
    NoSuchNetwork(String),
    /// A network of that name, or on that bridge, is defined already.
    NetworkExists(String),
    /// No template of that name.
    NoSuchTemplate(String),
    /// There is a template of that name already.
    TemplateExists(String),
    /// No job of that number; it may have ended.
    NoSuchJob(String),
    /// The definition is malformed or asks for something impossible.
    InvalidSpec(String),
    /// The definition was changed by somebody else in between.
    GenerationMismatch(String),
    /// The VM's state does not allow the verb.
    InvalidState(String),
    /// Another verb is under way on this VM.
    Busy(String),
    /// The host ran out of something.
    ResourceExhausted(String),
    /// The VMM did not answer in time.
    QmpTimeout(String),
    /// The VMM answered with an error; the text carries its class and description.
    QmpError(String),
    /// The VMM ended while the verb was under way.
    VmmDied(String),
    /// This version cannot do that.
    NotSupported(String),
    /// The VM could not be launched: systemd's or the kernel's reason.
    LaunchFailed(String),
    /// A bridge or tap could not be set up.
    NetworkFailed(String),
    /// The record store could not be read or written.
    StoreFailed(String),
    /// The host is being drained: nothing is started on it.
    Draining(String),
    /// polkit said no.
    AccessDenied(String),
    /// The job was cancelled.
    Cancelled(String),
}
