//! DHCP servers of networks under systemd: one instance of `flotilla-dhcp@.service` each.

use std::collections::BTreeSet;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::{SystemdLauncher, UNIT};
use crate::launch::LaunchError;
use crate::launch::dhcp::DhcpServers;
use crate::launch::unit::{DHCP_PREFIX, SUFFIX, dhcp_unit_of, network_of_unit};

fn ended(result: &str, verb: &str, unit: String) -> Result<(), LaunchError> {
    if result == "done" {
        return Ok(());
    }
    let text = format!("its {verb} ended as \"{result}\": is dnsmasq installed? See journalctl -u {unit}");
    Err(LaunchError::Unit { text, unit })
}

impl DhcpServers for SystemdLauncher {
    fn start<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            let unit = dhcp_unit_of(network);
            let result = self.job(&unit, "start", self.manager.start_unit(&unit, "replace")).await?;
            ended(&result, "start", unit)
        }
        .boxed()
    }

    fn reload<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            let unit = dhcp_unit_of(network);
            self.call(&unit, "signal", self.manager.kill_unit(&unit, "main", libc::SIGHUP)).await
        }
        .boxed()
    }

    fn stop<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<(), LaunchError>> {
        async move {
            let unit = dhcp_unit_of(network);
            let result = self.job(&unit, "stop", self.manager.stop_unit(&unit, "replace")).await?;
            // One that failed before would stay in systemd's list for ever. One that it does not know is an error here, and fine.
            let _ = self.call(&unit, "reset", self.manager.reset_failed_unit(&unit)).await;
            ended(&result, "stop", unit)
        }
        .boxed()
    }

    fn runs<'a>(&'a self, network: &'a str) -> BoxFuture<'a, Result<bool, LaunchError>> {
        async move {
            let state: String = self.property(&dhcp_unit_of(network), UNIT, "ActiveState").await?;
            Ok(matches!(state.as_str(), "active" | "reloading"))
        }
        .boxed()
    }

    fn all(&self) -> BoxFuture<'_, Result<BTreeSet<String>, LaunchError>> {
        async move {
            let pattern = format!("{DHCP_PREFIX}*{SUFFIX}");
            let rows =
                self.call(&pattern, "list", self.manager.list_units_by_patterns(&[], &[&pattern])).await?;
            Ok(rows.iter().filter_map(|row| network_of_unit(&row.0)).map(str::to_owned).collect())
        }
        .boxed()
    }

    fn hint(&self, network: &str) -> String {
        format!("see journalctl -u {}", dhcp_unit_of(network))
    }
}
