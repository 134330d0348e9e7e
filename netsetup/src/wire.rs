//! One rtnetlink socket and the few requests we make on it. Every wait has a deadline.
//!
//! A socket lives for one public call: a request that missed its deadline takes its late answer with it, a broken socket
//! spoils one call only, and the price (a socket and a task) is small beside the kernel's RTNL lock.

use std::future::Future;
use std::io;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder};
use tokio::task::JoinHandle;

use crate::error::NetError;
use crate::link::Link;

/// How long the kernel may take for one request. It takes microseconds, or as long as somebody else holds the RTNL lock:
/// seconds on a host that is busy making or removing thousands of links.
const DEADLINE: Duration = Duration::from_secs(10);
/// The kernel's mark on a listing that raced with a change (NLM_F_DUMP_INTR).
const DUMP_INTERRUPTED: u16 = 0x10;
/// How often a listing is tried before we give up.
const LIST_TRIES: u32 = 8;

/// An open rtnetlink socket in the network namespace of the thread that opened it.
pub(crate) struct Wire {
    handle: Handle,
    driver: JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Wire {
    pub(crate) fn open() -> Result<Wire, NetError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| NetError::NoRuntime)?;
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetError::Connect)?;
        Ok(Wire { handle, driver: runtime.spawn(connection) })
    }

    /// The link called `name`, or `None`.
    pub(crate) async fn find(&self, name: &str) -> Result<Option<Link>, NetError> {
        let request = self.handle.link().get().match_name(name).execute();
        let answer = ask("read it", name, async move { std::pin::pin!(request).try_next().await }).await;
        let link = match absent(answer)? {
            Some(Some(message)) => Link::from_message(&message),
            _ => return Ok(None),
        };
        if link.name != name {
            // The kernel looks names up among the alternative names as well.
            return Err(NetError::AlternativeName { name: name.to_owned(), real: link.name });
        }
        Ok(Some(link))
    }

    /// Every link.
    pub(crate) async fn list(&self) -> Result<Vec<Link>, NetError> {
        const WHAT: &str = "list all links";
        for _ in 0..LIST_TRIES {
            let mut query = LinkMessage::default();
            query.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
            let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(query));
            request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
            let mut handle = self.handle.clone();
            let (links, interrupted) = ask(WHAT, "*", async move {
                let mut links = Vec::new();
                let mut interrupted = false;
                let mut answers = handle.request(request)?;
                while let Some(answer) = answers.next().await {
                    interrupted |= answer.header.flags & DUMP_INTERRUPTED != 0;
                    match answer.payload {
                        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                            links.push(Link::from_message(&message));
                        }
                        NetlinkPayload::Error(error) => return Err(rtnetlink::Error::NetlinkError(error)),
                        _ => {}
                    }
                }
                Ok((links, interrupted))
            })
            .await?;
            if !interrupted {
                return Ok(links);
            }
        }
        Err(NetError::Restless { tries: LIST_TRIES })
    }

    /// Makes a link.
    pub(crate) async fn add(
        &self,
        name: &str,
        what: &'static str,
        message: LinkMessage,
    ) -> Result<(), NetError> {
        ask(what, name, self.handle.link().add(message).execute()).await
    }

    /// Changes a link that exists; fails when it does not.
    pub(crate) async fn change<T>(
        &self,
        name: &str,
        what: &'static str,
        change: LinkMessageBuilder<T>,
    ) -> Result<(), NetError> {
        ask(what, name, self.handle.link().change(change.build()).execute()).await
    }

    /// Removes a link; one that is gone already is fine.
    pub(crate) async fn delete(&self, name: &str, index: u32) -> Result<(), NetError> {
        absent(ask("remove it", name, self.handle.link().del(index).execute()).await).map(|_| ())
    }

    /// The addresses of a link.
    pub(crate) async fn addresses(&self, name: &str, index: u32) -> Result<Vec<IpNet>, NetError> {
        let request = self.handle.address().get().set_link_index_filter(index).execute();
        let messages = ask("list its addresses", name, request.try_collect::<Vec<_>>()).await?;
        Ok(messages
            .iter()
            .filter_map(|message| {
                // IFA_LOCAL is the host's own address; IFA_ADDRESS is the peer's on a point-to-point link, and the only one for IPv6.
                let local = message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Local(address) => Some(*address),
                    _ => None,
                });
                let address = local.or_else(|| {
                    message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Address(address) => Some(*address),
                        _ => None,
                    })
                })?;
                IpNet::new(address, message.header.prefix_len).ok()
            })
            .collect())
    }

    /// Gives a link an address; one that it has already is fine.
    pub(crate) async fn add_address(&self, name: &str, index: u32, address: IpNet) -> Result<(), NetError> {
        let request = self.handle.address().add(index, address.addr(), address.prefix_len()).execute();
        match ask("add an address", name, request).await {
            Err(NetError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Takes an address off a link; one that it does not have is fine.
    pub(crate) async fn delete_address(
        &self,
        name: &str,
        index: u32,
        address: IpNet,
    ) -> Result<(), NetError> {
        let mut message = AddressMessage::default();
        message.header.family = match address {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.attributes.push(AddressAttribute::Local(address.addr()));
        message.attributes.push(AddressAttribute::Address(address.addr()));
        match ask("remove an address", name, self.handle.address().del(message).execute()).await {
            Err(NetError::Refused { source, .. }) if source.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
                Ok(())
            }
            other => other,
        }
    }
}

/// Waits for one answer, and words its failure.
async fn ask<T>(
    what: &'static str,
    name: &str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, NetError> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(rtnetlink::Error::NetlinkError(error))) => {
            let source = io::Error::from_raw_os_error(error.raw_code().saturating_neg());
            Err(NetError::Refused { what, name: name.to_owned(), source })
        }
        Ok(Err(source)) => Err(NetError::Protocol { what, name: name.to_owned(), source }),
        Err(_) => Err(NetError::Deadline { what, name: name.to_owned(), after: DEADLINE }),
    }
}

/// Turns "no such device" into `None`.
fn absent<T>(answer: Result<T, NetError>) -> Result<Option<T>, NetError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(NetError::Refused { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs a blocking call on `/dev/net/tun` off the reactor, with the same deadline. One that ends later is without
/// consequence: its descriptor is closed, and a tap that was not made persistent goes with it.
pub(crate) async fn blocking<T: Send + 'static>(
    what: &'static str,
    name: &str,
    call: impl FnOnce() -> Result<T, NetError> + Send + 'static,
) -> Result<T, NetError> {
    match tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(call)).await {
        Ok(Ok(done)) => done,
        Ok(Err(join)) => {
            Err(NetError::Refused { what, name: name.to_owned(), source: io::Error::other(join) })
        }
        Err(_) => Err(NetError::Deadline { what, name: name.to_owned(), after: DEADLINE }),
    }
}
