//! May this caller do that? On the system bus polkit decides about the *caller* (its unique bus name, which the bus vouches for), with the
//! VM's name as a detail for rules. Nothing is cached: polkit keeps what an administrator granted for a while.
//!
//! On any other bus (a session, a private one, the quick try without root) there is no polkit: the daemon's own user, and root, may.

use std::collections::HashMap;

use dbus_api::error::Error;
use tracing::warn;
use zbus::message::{Flags, Header};
use zbus::{Connection, fdo};
use zbus_polkit::policykit1::{AuthorityProxy, CheckAuthorizationFlags, Subject};

/// How callers are judged.
pub enum Access {
    /// By polkit, over this connection. Where polkit is not installed, only root may.
    Polkit(Connection),
    /// The daemon's own user and root may do everything.
    SameUser(Connection),
}

impl Access {
    /// The caller's user and process (0 when unknown), for the audit.
    pub(super) async fn caller(&self, header: &Header<'_>) -> Result<(u32, u32), Error> {
        let (Self::Polkit(connection) | Self::SameUser(connection)) = self;
        let unknown = |error: &dyn std::fmt::Display| denied(format!("the caller is not known: {error}"));
        let of_bus;
        let credentials = if connection.is_bus() {
            let sender = header.sender().ok_or_else(|| denied("the caller is not known".to_owned()))?;
            let bus = fdo::DBusProxy::new(connection).await?;
            let asked = bus.get_connection_credentials(sender.to_owned().into()).await;
            of_bus = asked.map_err(|error| unknown(&error))?;
            &of_bus
        } else {
            &**connection.peer_creds().await.map_err(|error| unknown(&error))?
        };
        let uid = credentials.unix_user_id().ok_or_else(|| denied("the caller is not known".to_owned()))?;
        Ok((uid, credentials.process_id().unwrap_or_default()))
    }

    /// Fails with `AccessDenied` unless the caller may do `action` to the VM `name`.
    pub(super) async fn check(&self, header: &Header<'_>, action: &str, name: &str) -> Result<(), Error> {
        match self {
            Self::Polkit(connection) => ask_polkit(connection, header, action, name).await,
            Self::SameUser(connection) => {
                let own = rustix::process::geteuid().as_raw();
                match caller(connection, header).await? {
                    uid if uid == own || uid == 0 => Ok(()),
                    uid => Err(denied(format!("user {uid} is not the daemon's own user ({own})"))),
                }
            }
        }
    }
}

fn denied(text: String) -> Error {
    Error::AccessDenied(text)
}

async fn caller(connection: &Connection, header: &Header<'_>) -> Result<u32, Error> {
    if !connection.is_bus() {
        // A connection without a bus between has one peer, and the kernel knows it.
        let credentials = connection.peer_creds().await.map_err(|error| denied(error.to_string()))?;
        return credentials.unix_user_id().ok_or_else(|| denied("the caller is not known".to_owned()));
    }
    let sender = header.sender().ok_or_else(|| denied("the caller is not known".to_owned()))?;
    let bus = fdo::DBusProxy::new(connection).await?;
    let uid = bus.get_connection_unix_user(sender.to_owned().into()).await;
    uid.map_err(|error| denied(format!("the caller is not known: {error}")))
}

async fn ask_polkit(
    connection: &Connection,
    header: &Header<'_>,
    action: &str,
    name: &str,
) -> Result<(), Error> {
    let subject = Subject::new_for_message_header(header)
        .map_err(|error| denied(format!("the caller is not known: {error}")))?;
    // Asking the person takes as long as the person takes, so the caller must have said that it waits.
    let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
    let flags = if interactive {
        CheckAuthorizationFlags::ALLOW_USER_INTERACTION
    } else {
        CheckAuthorizationFlags::empty()
    };
    let details = HashMap::from([("vm", name)]);
    let authority = AuthorityProxy::new(connection).await?;
    match authority.check_authorization(&subject, action, &details, flags, "").await {
        Ok(answer) if answer.is_authorized => Ok(()),
        Ok(answer) if answer.is_challenge => Err(denied(format!(
            "{action}: authentication is needed (use sudo, or run where a polkit agent can ask)"
        ))),
        Ok(_) => Err(denied(format!("{action}: polkit says no"))),
        Err(zbus::Error::MethodError(error, text, _)) if absent(error.as_str()) => {
            match caller(connection, header).await? {
                0 => Ok(()),
                uid => Err(denied(format!(
                    "polkit does not run ({}), so only root may, not user {uid}",
                    text.unwrap_or_default()
                ))),
            }
        }
        Err(error) => {
            warn!("polkit: {error}");
            Err(denied(format!("{action}: polkit could not be asked: {error}")))
        }
    }
}

/// Errors that mean "there is no polkit here" (not installed, masked), as opposed to one that fails.
fn absent(error: &str) -> bool {
    matches!(
        error,
        "org.freedesktop.DBus.Error.ServiceUnknown"
            | "org.freedesktop.DBus.Error.NameHasNoOwner"
            | "org.freedesktop.DBus.Error.Spawn.ServiceNotFound"
            | "org.freedesktop.systemd1.NoSuchUnit"
            | "org.freedesktop.systemd1.UnitMasked"
    )
}
