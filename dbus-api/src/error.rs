//! The named errors of the API: `org.flotilla.Flotilla1.Error.*`. The name is stable; the text says what was wrong and what to do.
//!
//! What any service may say (`org.freedesktop.DBus.Error.InvalidArgs`) keeps its general name on the bus: [`Error::ZBus`] carries it.

use std::borrow::Cow;
use std::fmt;

use zbus::message::{Header, Message};
use zbus::names::ErrorName;
use zbus::{DBusError, fdo};

/// Longest text that goes over the bus, in bytes: an error quotes what was wrong, and a caller may have sent megabytes of it.
const LONGEST: usize = 2048;

macro_rules! errors {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// An error as a client sees it. Every variant carries its message.
        #[derive(Debug)]
        pub enum Error {
            /// Trouble on the bus itself, or an error that any service may have.
            ZBus(zbus::Error),
            $($(#[doc = $doc])+ $name(String),)+
        }

        impl DBusError for Error {
            fn name(&self) -> ErrorName<'_> {
                match self {
                    Self::ZBus(zbus::Error::FDO(error)) => match &**error {
                        fdo::Error::ZBus(_) => fixed("org.freedesktop.DBus.Error.Failed"),
                        error => error.name(),
                    },
                    Self::ZBus(zbus::Error::MethodError(name, ..)) => name.as_ref(),
                    Self::ZBus(_) => fixed("org.freedesktop.DBus.Error.Failed"),
                    $(Self::$name(_) => fixed(concat!("org.flotilla.Flotilla1.Error.", stringify!($name))),)+
                }
            }

            fn description(&self) -> Option<&str> {
                match self {
                    Self::ZBus(zbus::Error::FDO(error)) => error.description(),
                    Self::ZBus(error) => error.description(),
                    $(Self::$name(text) => Some(text),)+
                }
            }

            fn create_reply(&self, call: &Header<'_>) -> zbus::Result<Message> {
                let text = match (self, self.description()) {
                    (_, Some(text)) => Cow::Borrowed(text),
                    (Self::ZBus(error), None) => Cow::Owned(error.to_string()),
                    (_, None) => Cow::Borrowed(""),
                };
                Message::error(call, self.name()).build(&clipped(&text).as_ref())
            }
        }

        impl From<zbus::Error> for Error {
            fn from(error: zbus::Error) -> Self {
                let zbus::Error::MethodError(name, text, _) = &error else { return Self::ZBus(error) };
                let text = || text.clone().unwrap_or_default();
                match name.strip_prefix("org.flotilla.Flotilla1.Error.") {
                    $(Some(stringify!($name)) => Self::$name(text()),)+
                    _ => Self::ZBus(error),
                }
            }
        }
    };
}

errors! {
    /// No VM of that name, uuid or path.
    NoSuchVm,
    /// A VM of that name is defined already.
    VmExists,
    /// No network of that name.
    NoSuchNetwork,
    /// A network of that name, or on that bridge, is defined already.
    NetworkExists,
    /// No template of that name.
    NoSuchTemplate,
    /// There is a template of that name already.
    TemplateExists,
    /// VMs or templates lie over the template.
    TemplateInUse,
    /// No job of that number; it may have ended.
    NoSuchJob,
    /// The definition is malformed or asks for something impossible.
    InvalidSpec,
    /// The definition was changed by somebody else in between.
    GenerationMismatch,
    /// The VM's state does not allow the verb.
    InvalidState,
    /// Another verb is under way on this VM.
    Busy,
    /// The host ran out of something.
    ResourceExhausted,
    /// The VMM did not answer in time.
    QmpTimeout,
    /// The VMM answered with an error; the text carries its class and description.
    QmpError,
    /// The VMM ended while the verb was under way.
    VmmDied,
    /// This version cannot do that.
    NotSupported,
    /// The VM could not be launched: systemd's or the kernel's reason.
    LaunchFailed,
    /// A bridge or tap could not be set up.
    NetworkFailed,
    /// The record store could not be read or written.
    StoreFailed,
    /// The host is being drained: nothing is started on it.
    Draining,
    /// polkit said no.
    AccessDenied,
    /// The job was cancelled.
    Cancelled,
}

fn fixed(name: &'static str) -> ErrorName<'static> {
    ErrorName::from_static_str_unchecked(name)
}

/// As much of a text as goes over the bus.
fn clipped(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST {
        return Cow::Borrowed(text);
    }
    let end = (0..=LONGEST).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    Cow::Owned(format!("{} ...", &text[..end]))
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name(), self.description().unwrap_or("no description"))
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(error: &Error) -> (String, String) {
        let call = Message::method_call("/", "Do").build(&()).unwrap();
        let reply = error.create_reply(&call.header()).unwrap();
        let name = reply.header().error_name().unwrap().to_string();
        (name, reply.body().deserialize::<String>().unwrap())
    }

    #[test]
    fn each_error_has_its_name_on_the_bus() {
        let invalid = fdo::Error::InvalidArgs("what".into());
        let cases = [
            (Error::NoSuchVm("web".into()), "org.flotilla.Flotilla1.Error.NoSuchVm", "web"),
            (Error::ZBus(invalid.into()), "org.freedesktop.DBus.Error.InvalidArgs", "what"),
        ];
        for (error, name, text) in cases {
            assert_eq!(answer(&error), (name.to_owned(), text.to_owned()), "{error}");
            assert_eq!(error.to_string(), format!("{name}: {text}"));
        }
        let (name, text) = answer(&Error::ZBus(zbus::Error::InvalidObjectPath));
        assert_eq!(name, "org.freedesktop.DBus.Error.Failed");
        assert!(!text.is_empty());
    }

    #[test]
    fn a_text_is_quoted_and_not_sent_back_whole() {
        let (_, text) = answer(&Error::NoSuchVm("\u{20ac}".repeat(1 << 20)));
        assert!(text.len() <= LONGEST + 4 && text.ends_with("\u{20ac} ..."), "{}", text.len());
        let short = "a".repeat(LONGEST);
        assert_eq!(answer(&Error::Busy(short.clone())).1, short);
    }
}
