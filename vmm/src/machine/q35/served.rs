//! Devices of a running q35 that other processes serve (vhost-user): owns the sockets that clients have named for them, and who uses which.
//!
//! ```text
//! socket:  chardev-add ──▶ idle ──netdev_add, device_add──▶ used ──netdev_del, the device has left──▶ idle ──chardev-remove──▶ (unknown)
//! ```
//!
//! Nothing is connected before a device needs it: a back end takes one connection, and ends with it.

use std::path::PathBuf;

use crate::config::{ChardevKind, Device, VmConfig};
use crate::event::LoopHandle;
use crate::machine::plugging::PlugError;
use crate::virtio::vhost_user::{Model, VhostUser, VhostUserError, VhostUserOptions};

/// Named sockets: more could never be used.
const SOCKETS_MAX: usize = 64;

/// What is known by the name of a chardev.
struct Known {
    id: String,
    /// `None`: a character device of the command line, which serves nothing.
    socket: Option<PathBuf>,
    /// As in `netdev n`.
    user: Option<String>,
}

/// The sockets, and what their devices need besides.
pub(super) struct Sockets {
    known: Vec<Known>,
    memory_is_shared: bool,
    main_loop: LoopHandle,
}

impl Sockets {
    /// Those of the command line.
    pub(super) fn new(config: &VmConfig, main_loop: LoopHandle) -> Self {
        let user = |chardev: &str| {
            let netdev = config.netdevs.iter().find(|n| n.vhost_user_chardev() == Some(chardev));
            let device = || {
                let served = |d: &&Device| config.vhost_user_chardev(&d.driver) == Some(chardev);
                config.devices.iter().find(served).map(|d| format!("device {}", d.id))
            };
            netdev.map(|n| format!("netdev {}", n.id)).or_else(device)
        };
        let known = config.chardevs.iter().map(|chardev| {
            let user = user(&chardev.id);
            let socket = match &chardev.kind {
                ChardevKind::UnixSocket { path, .. } if user.is_some() => Some(path.clone()),
                _ => None,
            };
            Known { id: chardev.id.clone(), socket, user }
        });
        Self { known: known.collect(), memory_is_shared: config.memory_is_shared(), main_loop }
    }

    /// `chardev-add`.
    pub(super) fn add(&mut self, id: String, socket: PathBuf) -> Result<(), PlugError> {
        if self.known.iter().any(|k| k.id == id) {
            return Err(PlugError::ChardevExists(id));
        }
        if self.known.len() >= SOCKETS_MAX {
            return Err(PlugError::TooManyChardevs(SOCKETS_MAX));
        }
        self.known.push(Known { id, socket: Some(socket), user: None });
        Ok(())
    }

    /// `chardev-remove`.
    pub(super) fn remove(&mut self, id: &str) -> Result<(), PlugError> {
        self.idle(id)?;
        self.known.retain(|k| k.id != id);
        Ok(())
    }

    fn idle(&mut self, id: &str) -> Result<&mut Known, PlugError> {
        let known = self.known.iter_mut().find(|k| k.id == id);
        let known = known.ok_or_else(|| PlugError::NoChardev(id.to_owned()))?;
        match (&known.user, &known.socket) {
            (None, Some(_)) => Ok(known),
            (Some(user), _) => Err(PlugError::ChardevInUse(id.to_owned(), user.clone())),
            (None, None) => Err(PlugError::ChardevInUse(id.to_owned(), "the command line".to_owned())),
        }
    }

    /// Whether a device could be served through it, by a user to come.
    pub(super) fn check(&mut self, id: &str) -> Result<(), PlugError> {
        if !self.memory_is_shared {
            return Err(PlugError::PrivateMemory);
        }
        self.idle(id).map(|_| ())
    }

    /// From now on it is `user`'s, or nobody's.
    pub(super) fn use_by(&mut self, id: &str, user: Option<String>) {
        if let Some(known) = self.known.iter_mut().find(|k| k.id == id) {
            known.user = user;
        }
    }

    /// Connects to the back end. Waits for its answers, with a deadline.
    pub(super) fn open(
        &self,
        device: &str,
        chardev: &str,
        model: Model,
        queue_size: u16,
    ) -> Result<VhostUser, VhostUserError> {
        let socket = self.known.iter().find(|k| k.id == chardev).and_then(|k| k.socket.clone());
        VhostUser::open(VhostUserOptions {
            device: device.to_owned(),
            chardev: chardev.to_owned(),
            socket: socket.unwrap_or_default(),
            model,
            queue_size,
            main_loop: self.main_loop.clone(),
        })
    }
}
