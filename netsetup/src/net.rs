//! Ensure, remove, list: the crate's public calls. Each looks first, then does what is missing, and only that.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use ipnet::IpNet;
use rtnetlink::packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute};
use rtnetlink::{LinkBridge, LinkBridgePort, LinkUnspec};
use tokio::sync::Mutex;

use crate::error::NetError;
use crate::link::{Link, LinkKind, Outcome};
use crate::name::{BRIDGE_TAG, MTU_MAX, TAG_PREFIX, check_address, check_mtu, check_name, check_tag};
use crate::tap;
use crate::wire::{Wire, blocking};

/// A bridge that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgeSpec {
    /// Its name.
    pub name: String,
    /// Addresses of the host on it; others that it has are left alone.
    pub addresses: Vec<IpNet>,
    /// Largest packet, in bytes (68 to 65521); `None`: the kernel's choice.
    pub mtu: Option<u32>,
}

/// A persistent tap that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSpec {
    /// Its name; see [`tap_name`](crate::tap_name).
    pub name: String,
    /// The bridge it is a port of; `None`: whatever it is or is not a port of now.
    pub bridge: Option<String>,
    /// User id that may open it without privilege; `None`: nobody, or whoever may now.
    pub owner: Option<u32>,
    /// Whose it is: `flotilla:` and something that names the owner.
    pub tag: String,
    /// Largest packet, in bytes (68 to 65521); `None`: the bridge's when the tap is made, then as it is.
    pub mtu: Option<u32>,
    /// No frame goes between it and other isolated ports of its bridge, only between it and ports that are not (`bridge(8)`).
    pub isolated: bool,
}

/// The host's links. Cheap to clone; calls may run at the same time, but not two for one name.
#[derive(Debug, Clone)]
pub struct Net {
    /// Held while a bridge is looked for, made and tagged: two VMs that start at once share one bridge.
    bridges: Arc<Mutex<()>>,
}

impl Net {
    /// Checks that links can be talked about. Works in the network namespace of the calling thread.
    ///
    /// # Errors
    /// [`NetError::NoRuntime`] outside a tokio runtime, [`NetError::Connect`] when the kernel gives no socket.
    pub fn connect() -> Result<Net, NetError> {
        Wire::open()?;
        Ok(Net { bridges: Arc::new(Mutex::new(())) })
    }

    /// Makes sure that a bridge is there, up, and has the addresses and MTU asked for.
    ///
    /// A bridge that we did not make is used as it is: never changed, and an error when it lacks something asked for.
    ///
    /// # Errors
    /// A bad name, MTU or address; a link of that name that is no bridge; [`NetError::ForeignBridge`]; what the kernel refuses.
    pub async fn ensure_bridge(&self, spec: &BridgeSpec) -> Result<Link, NetError> {
        check_name(&spec.name)?;
        check_mtu(&spec.name, spec.mtu)?;
        for address in &spec.addresses {
            check_address(&spec.name, *address)?;
        }
        let _one_at_a_time = self.bridges.lock().await;
        let wire = Wire::open()?;
        let (bridge, created) = match wire.find(&spec.name).await? {
            Some(link) => (link, false),
            None => (make_bridge(&wire, &spec.name).await?, true),
        };
        if bridge.kind != LinkKind::Bridge {
            return Err(wrong_kind(&bridge, "bridge"));
        }
        let present = if spec.addresses.is_empty() {
            Vec::new()
        } else {
            wire.addresses(&bridge.name, bridge.index).await?
        };
        let missing: Vec<IpNet> =
            spec.addresses.iter().copied().filter(|wanted| !present.contains(wanted)).collect();
        if bridge.alias != BRIDGE_TAG {
            check_foreign_bridge(&bridge, spec.mtu, &missing)?;
            return Ok(bridge);
        }

        let mut change = LinkUnspec::new_with_index(bridge.index);
        let mut changed = false;
        if let Some(mtu) = spec.mtu.filter(|mtu| *mtu != bridge.mtu) {
            change = change.mtu(mtu);
            changed = true;
        }
        if !bridge.up {
            change = change.up();
            changed = true;
        }
        if changed {
            wire.change(&bridge.name, "set it up", change).await?;
        }
        for address in &missing {
            wire.add_address(&bridge.name, bridge.index, *address).await?;
        }
        let changed = changed || !missing.is_empty();
        verify(&wire, &bridge, "bridge", outcome(created, changed)).await
    }

    /// Takes addresses off a bridge that we made; those that it does not have are fine. Of another's bridge nothing is taken.
    ///
    /// # Errors
    /// A bad name; what the kernel refuses.
    pub async fn drop_addresses(&self, name: &str, addresses: &[IpNet]) -> Result<(), NetError> {
        check_name(name)?;
        let _one_at_a_time = self.bridges.lock().await;
        let wire = Wire::open()?;
        let Some(bridge) = wire.find(name).await?.filter(|bridge| bridge.alias == BRIDGE_TAG) else {
            return Ok(());
        };
        for address in addresses {
            wire.delete_address(name, bridge.index, *address).await?;
        }
        Ok(())
    }

    /// Makes sure that a persistent tap is there, tagged, up, and on its bridge.
    ///
    /// Until everything is set the tap is not persistent, so that an error, or our death, leaves nothing behind.
    ///
    /// # Errors
    /// A bad name, tag or MTU; a bridge that is missing or none; a link of that name that is no tap, or not tagged so
    /// ([`NetError::Foreign`]); [`NetError::Busy`] when the owner must change while a VM runs; what the kernel refuses.
    pub async fn ensure_tap(&self, spec: &TapSpec) -> Result<Link, NetError> {
        check_name(&spec.name)?;
        check_tag(&spec.tag)?;
        check_mtu(&spec.name, spec.mtu)?;
        if let Some(bridge) = &spec.bridge {
            check_name(bridge)?;
        }
        let wire = Wire::open()?;
        let bridge = match &spec.bridge {
            None => None,
            Some(name) => match wire.find(name).await? {
                None => return Err(NetError::Missing { kind: "bridge", name: name.clone() }),
                Some(link) if link.kind != LinkKind::Bridge => return Err(wrong_kind(&link, "bridge")),
                Some(link) => Some(link),
            },
        };
        match wire.find(&spec.name).await? {
            None => make_tap(&wire, spec, bridge.as_ref()).await,
            Some(tap) => mend_tap(&wire, spec, &tap, bridge.as_ref()).await,
        }
    }

    /// Opens a tap that exists, to hand it to a VMM: single queue, virtio-net headers, non-blocking, close-on-exec.
    ///
    /// # Errors
    /// [`NetError::Missing`], [`NetError::WrongKind`], [`NetError::Busy`] when a VM has it, [`NetError::TapMode`].
    pub async fn open_tap(&self, name: &str) -> Result<OwnedFd, NetError> {
        check_name(name)?;
        let wire = Wire::open()?;
        let missing = || NetError::Missing { kind: "tap", name: name.to_owned() };
        let before = wire.find(name).await?.ok_or_else(missing)?;
        let LinkKind::Tap { multi_queue, .. } = before.kind else { return Err(wrong_kind(&before, "tap")) };
        if multi_queue {
            return Err(NetError::TapMode { name: name.to_owned() });
        }
        attach_to(&wire, &before).await
    }

    /// Removes the link `name` if it carries `tag`. One that is not there is fine.
    ///
    /// # Errors
    /// [`NetError::Foreign`] when it carries another tag or none; what the kernel refuses.
    pub async fn remove(&self, name: &str, tag: &str) -> Result<(), NetError> {
        check_name(name)?;
        check_tag(tag)?;
        let wire = Wire::open()?;
        let Some(link) = wire.find(name).await? else { return Ok(()) };
        if link.alias != tag {
            return Err(foreign(&link, tag));
        }
        wire.delete(&link.name, link.index).await
    }

    /// Removes every link that carries `tag`, and returns their names. A failure does not stop it.
    ///
    /// # Errors
    /// [`NetError::Several`] with each link that could not be removed, after the others are gone.
    pub async fn remove_tagged(&self, tag: &str) -> Result<Vec<String>, NetError> {
        check_tag(tag)?;
        let wire = Wire::open()?;
        let mut removed = Vec::new();
        let mut failed = Vec::new();
        for link in wire.list().await?.into_iter().filter(|link| link.alias == tag) {
            match wire.delete(&link.name, link.index).await {
                Ok(()) => removed.push(link.name),
                Err(error) => failed.push(error),
            }
        }
        if failed.is_empty() { Ok(removed) } else { Err(NetError::Several(failed)) }
    }

    /// Every link that carries one of our tags. Reads all links of the host: for start-up and for audits.
    ///
    /// # Errors
    /// What the kernel refuses; [`NetError::Restless`].
    pub async fn tagged(&self) -> Result<Vec<Link>, NetError> {
        let mut links = Wire::open()?.list().await?;
        links.retain(|link| link.alias.starts_with(TAG_PREFIX));
        Ok(links)
    }
}

/// Makes a bridge and tags it. The kernel takes no alias in the message that makes a link, so there are two; when the
/// second fails the bridge is taken away again.
async fn make_bridge(wire: &Wire, name: &str) -> Result<Link, NetError> {
    wire.add(name, "make the bridge", LinkBridge::new(name).down().build()).await?;
    let bridge =
        wire.find(name).await?.ok_or_else(|| NetError::Missing { kind: "bridge", name: name.to_owned() })?;
    // Left to itself a bridge takes the lowest address of its ports, and changes it as VMs come and go; guests would
    // lose their gateway's address. One that was set stays.
    let change = LinkUnspec::new_with_index(bridge.index).alias(BRIDGE_TAG).address(bridge.address.clone());
    if let Err(error) = wire.change(name, "tag it", change).await {
        return Err(match wire.delete(name, bridge.index).await {
            Ok(()) => error,
            Err(undo) => NetError::Several(vec![error, undo]),
        });
    }
    Ok(Link { alias: BRIDGE_TAG.to_owned(), tag: Some(BRIDGE_TAG.to_owned()), ..bridge })
}

/// A bridge of the administrator must already be what was asked for.
fn check_foreign_bridge(bridge: &Link, mtu: Option<u32>, missing: &[IpNet]) -> Result<(), NetError> {
    let (what, command) = if let Some(address) = missing.first() {
        (format!("lacks address {address}"), format!("ip address add {address} dev {}", bridge.name))
    } else if let Some(mtu) = mtu.filter(|mtu| *mtu != bridge.mtu) {
        (format!("has MTU {}, not {mtu}", bridge.mtu), format!("ip link set {} mtu {mtu}", bridge.name))
    } else {
        if !bridge.up {
            tracing::warn!(
                bridge = bridge.name,
                "the bridge is down; its VMs have no network until it is set up"
            );
        }
        return Ok(());
    };
    Err(NetError::ForeignBridge { name: bridge.name.clone(), what, command })
}

async fn make_tap(wire: &Wire, spec: &TapSpec, bridge: Option<&Link>) -> Result<Link, NetError> {
    let (name, owner) = (spec.name.clone(), spec.owner);
    let fd = blocking("make the tap", &spec.name, move || {
        let fd = tap::create(&name)?;
        if let Some(owner) = owner {
            tap::give(&name, &fd, owner)?;
        }
        Ok(fd)
    })
    .await?;
    let missing = || NetError::Missing { kind: "tap", name: spec.name.clone() };
    let tap = wire.find(&spec.name).await?.ok_or_else(missing)?;
    // A bridge whose MTU nobody set takes the smallest of its ports': a tap must not shrink it.
    let mtu = spec.mtu.or(bridge.map(|bridge| bridge.mtu.min(MTU_MAX)));
    mend_settings(wire, spec, &tap, bridge, mtu).await?;
    let name = spec.name.clone();
    blocking("make it persistent", &spec.name, move || tap::keep(&name, &fd)).await?;
    verify(wire, &tap, "tap", Outcome::Created).await
}

async fn mend_tap(wire: &Wire, spec: &TapSpec, tap: &Link, bridge: Option<&Link>) -> Result<Link, NetError> {
    let LinkKind::Tap { owner, multi_queue } = tap.kind else { return Err(wrong_kind(tap, "tap")) };
    if tap.alias != spec.tag {
        return Err(foreign(tap, &spec.tag));
    }
    if multi_queue {
        return Err(NetError::TapMode { name: tap.name.clone() });
    }
    let mut changed = false;
    if let Some(wanted) = spec.owner.filter(|wanted| Some(*wanted) != owner) {
        let fd = attach_to(wire, tap).await?;
        let name = tap.name.clone();
        blocking("set its owner", &tap.name, move || tap::give(&name, &fd, wanted)).await?;
        changed = true;
    }
    changed |= mend_settings(wire, spec, tap, bridge, spec.mtu).await?;
    verify(wire, tap, "tap", outcome(false, changed)).await
}

/// Brings alias, MTU, bridge and state of a tap to what is asked. Says whether there was anything to do.
async fn mend_settings(
    wire: &Wire,
    spec: &TapSpec,
    tap: &Link,
    bridge: Option<&Link>,
    mtu: Option<u32>,
) -> Result<bool, NetError> {
    let mut changed = false;
    if tap.link_local == Some(true) {
        // The host end of a tap is a port, not a host: no address of its own. Before it is up, or it gets one at once.
        let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let change = LinkUnspec::new_with_index(tap.index)
            .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![none]));
        wire.change(&tap.name, "switch its IPv6 address off", change).await?;
        changed = true;
    }
    let mut change = LinkUnspec::new_with_index(tap.index);
    let mut needed = false;
    if tap.alias != spec.tag {
        change = change.alias(&spec.tag);
        needed = true;
    }
    if let Some(mtu) = mtu.filter(|mtu| *mtu != tap.mtu) {
        change = change.mtu(mtu);
        needed = true;
    }
    if let Some(bridge) = bridge.filter(|bridge| tap.controller != Some(bridge.index)) {
        change = change.controller(bridge.index);
        needed = true;
    }
    if !tap.up {
        change = change.up();
        needed = true;
    }
    if needed {
        wire.change(&tap.name, "set it up", change).await?;
    }
    // A tap that has just become a port is a port like any other.
    let isolated =
        tap.isolated && !(needed && bridge.is_some_and(|bridge| tap.controller != Some(bridge.index)));
    if (bridge.is_some() || tap.controller.is_some()) && isolated != spec.isolated {
        wire.change(&tap.name, "isolate it", LinkBridgePort::new(tap.index).isolated(spec.isolated)).await?;
        changed = true;
    }
    Ok(changed || needed)
}

/// Attaches to exactly this tap. TUNSETIFF goes by name and makes what is missing, so the index is compared afterwards.
async fn attach_to(wire: &Wire, tap: &Link) -> Result<OwnedFd, NetError> {
    let name = tap.name.clone();
    let fd = blocking("attach to the tap", &tap.name, move || tap::attach(&name)).await?;
    match wire.find(&tap.name).await? {
        Some(now) if now.index == tap.index => Ok(fd),
        _ => Err(NetError::Missing { kind: "tap", name: tap.name.clone() }),
    }
}

/// Reads the link back: what we return is what is there.
async fn verify(wire: &Wire, link: &Link, kind: &'static str, outcome: Outcome) -> Result<Link, NetError> {
    match wire.find(&link.name).await? {
        Some(now) if now.index == link.index => Ok(Link { outcome, ..now }),
        _ => Err(NetError::Missing { kind, name: link.name.clone() }),
    }
}

fn outcome(created: bool, changed: bool) -> Outcome {
    match (created, changed) {
        (true, _) => Outcome::Created,
        (false, true) => Outcome::Updated,
        (false, false) => Outcome::Unchanged,
    }
}

fn wrong_kind(link: &Link, wanted: &'static str) -> NetError {
    NetError::WrongKind { name: link.name.clone(), wanted, found: link.kind.describe() }
}

fn foreign(link: &Link, wanted: &str) -> NetError {
    NetError::Foreign { name: link.name.clone(), found: link.alias.clone(), wanted: wanted.to_owned() }
}
