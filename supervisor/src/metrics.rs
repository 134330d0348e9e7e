//! Metrics in the text format of Prometheus (version 0.0.4), over HTTP on the socket `metrics.sock` and, if the administrator says so, on a
//! loopback port. Everything comes from the fleet's memory and the kernel's accounts: no VMM is asked meanwhile, so no VM can delay an answer.
//!
//! Anybody on the host may read them, as anybody may list the VMs. A connection is one request, is closed after it, and has a few seconds.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::fleet::Fleet;
use crate::fleet::life::State;
use crate::fleet::samples::{Samples, Transfers};
use crate::fleet::usage::{Usage, Usages};
use crate::fleet::view::View;

/// How long a client has for its request, and to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// A request is longer than this only by mistake.
const REQUEST_MAX: usize = 8 << 10;
/// Clients at the same time; others wait.
const CLIENTS: usize = 16;

/// What is told once about the daemon.
#[derive(Debug, Clone, Copy)]
pub struct Start {
    /// How long it took to find the VMs again.
    pub adoption: Duration,
}

/// Serves the metrics; returns when the sockets are there.
///
/// # Errors
/// When one cannot be made.
pub async fn serve(
    fleet: Arc<Fleet>,
    start: Start,
    socket: &Path,
    listen: Option<SocketAddr>,
) -> io::Result<()> {
    // What an earlier daemon left.
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666))?;
    let clients = Arc::new(Semaphore::new(CLIENTS));
    let tcp = match listen {
        Some(address) => Some(TcpListener::bind(address).await?),
        None => None,
    };
    if let Some(listener) = tcp {
        let (fleet, clients) = (Arc::clone(&fleet), Arc::clone(&clients));
        tokio::spawn(async move {
            loop {
                let client = listener.accept().await.map(|(client, _)| client);
                take(&fleet, start, &clients, client).await;
            }
        });
    }
    tokio::spawn(async move {
        loop {
            let client = listener.accept().await.map(|(client, _)| client);
            take(&fleet, start, &clients, client).await;
        }
    });
    Ok(())
}

async fn take<S>(fleet: &Arc<Fleet>, start: Start, clients: &Arc<Semaphore>, client: io::Result<S>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            // Out of descriptors, most likely: they come back.
            warn!("metrics: {error}");
            return tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let Ok(permit) = Arc::clone(clients).acquire_owned().await else { return };
    let fleet = Arc::clone(fleet);
    tokio::spawn(async move {
        if let Err(error) = answer(&fleet, start, client).await {
            debug!("metrics: {error}");
        }
        drop(permit);
    });
}

/// One request.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    fleet: &Fleet,
    start: Start,
    mut client: S,
) -> io::Result<()> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let request = timeout(PATIENCE, read_request(&mut client)).await.map_err(late)??;
    let (status, body) = match parse(&request) {
        Request::Metrics => ("200 OK", text(fleet, start).await),
        Request::Other => ("404 Not Found", "The metrics are at /metrics.\n".to_owned()),
        Request::Bad => ("400 Bad Request", "Ask with GET /metrics HTTP/1.1.\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    let write = async {
        client.write_all(head.as_bytes()).await?;
        client.write_all(body.as_bytes()).await?;
        client.shutdown().await
    };
    timeout(PATIENCE, write).await.map_err(late)?
}

/// The request's head, up to its empty line, or what there is of it.
async fn read_request(client: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut request = Vec::new();
    let mut piece = [0; 1024];
    while request.len() < REQUEST_MAX && !ends(&request) {
        match client.read(&mut piece).await? {
            0 => break,
            count => request.extend_from_slice(&piece[..count]),
        }
    }
    Ok(request)
}

fn ends(request: &[u8]) -> bool {
    request.windows(4).any(|end| end == b"\r\n\r\n") || request.windows(2).any(|end| end == b"\n\n")
}

#[derive(Debug, PartialEq, Eq)]
enum Request {
    Metrics,
    Other,
    Bad,
}

fn parse(request: &[u8]) -> Request {
    let line = request.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).collect();
    match words[..] {
        [b"GET", target, version] if version.starts_with(b"HTTP/1.") && ends(request) => {
            let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
            if matches!(path, b"/metrics" | b"/") { Request::Metrics } else { Request::Other }
        }
        _ => Request::Bad,
    }
}

/// The page.
async fn text(fleet: &Fleet, start: Start) -> String {
    let views = fleet.list();
    let usages = fleet.usages(views.clone()).await;
    let mut page = Page::default();
    host(&mut page, fleet, start, &views);
    vms(&mut page, &views, &usages);
    said(&mut page, &fleet.latencies(), &fleet.samples());
    page.text
}

fn host(page: &mut Page, fleet: &Fleet, start: Start, views: &[Arc<View>]) {
    page.metric("flotilla_build_info", "gauge", "The daemon's version.");
    page.value(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.metric("flotilla_vms", "gauge", "VMs that are defined, by state.");
    for state in State::ALL {
        let count = views.iter().filter(|view| view.state == state).count();
        page.value(&[("state", state.word())], count);
    }
    let running = || views.iter().filter(|view| view.main_pid != 0);
    let sum = |of: fn(&View) -> u64| running().map(|view| of(view)).fold(0u64, u64::saturating_add);
    page.metric("flotilla_committed_memory_bytes", "gauge", "RAM of the guests that run, as defined.");
    page.value(&[], sum(|view| view.spec.memory.0));
    page.metric("flotilla_committed_vcpus", "gauge", "vCPUs of the guests that run.");
    page.value(&[], sum(|view| view.spec.cpus.into()));
    let limits = fleet.limits();
    for (name, help, limit) in [
        ("flotilla_limit_vms", "VMs that may run at the same time.", limits.max_vms.map(u64::from)),
        ("flotilla_limit_memory_bytes", "RAM that the guests may have together.", limits.max_memory),
        ("flotilla_limit_vcpus", "vCPUs that the guests may have together.", limits.max_cpus.map(u64::from)),
    ] {
        if let Some(limit) = limit {
            page.metric(name, "gauge", help);
            page.value(&[], limit);
        }
    }
    let help = "Starts that were refused: no room on the host, or it is drained.";
    page.metric("flotilla_admission_refused_total", "counter", help);
    page.value(&[], fleet.refusals());
    page.metric("flotilla_draining", "gauge", "1: no VM is started on this host.");
    page.value(&[], u8::from(fleet.draining()));
    page.metric("flotilla_corrupt_records", "gauge", "Records that could not be read and were set aside.");
    page.value(&[], fleet.corrupt().len());
    page.metric("flotilla_jobs", "gauge", "Jobs under way.");
    page.value(&[], fleet.jobs().len());
    page.metric("flotilla_events_total", "counter", "Events since the daemon's start.");
    page.value(&[], fleet.sequence());
    page.metric(
        "flotilla_adoption_seconds",
        "gauge",
        "How long the daemon took to find the VMs at its start.",
    );
    page.value(&[], start.adoption.as_secs_f64());
    if let Some(readiness) = fleet.readiness() {
        let help = "From the daemon's start until every VM that runs had answered or was known not to.";
        page.metric("flotilla_ready_seconds", "gauge", help);
        page.value(&[], readiness.as_secs_f64());
    }
}

/// What the VMMs said of themselves, when they were asked last.
fn said(page: &mut Page, latencies: &[(Arc<str>, Duration)], samples: &Samples) {
    let help = "How long its VMM took for its newest answer.";
    page.metric("flotilla_vm_qmp_latency_seconds", "gauge", help);
    for (vm, latency) in latencies {
        page.value(&[("vm", vm)], latency.as_secs_f64());
    }
    page.metric("flotilla_vm_balloon_bytes", "gauge", "Memory that its balloon leaves to the guest.");
    for (vm, sample) in samples {
        if let Some(bytes) = sample.balloon {
            page.value(&[("vm", vm)], bytes);
        }
    }
    type Count = (&'static str, &'static str, fn(&Transfers) -> u64);
    let counts: [Count; 5] = [
        ("read_bytes", "Bytes that the guest read from a disk.", |disk| disk.bytes[0]),
        ("written_bytes", "Bytes that the guest wrote to a disk.", |disk| disk.bytes[1]),
        ("reads", "Requests of the guest to read from a disk.", |disk| disk.requests[0]),
        ("writes", "Requests of the guest to write to a disk.", |disk| disk.requests[1]),
        ("flushes", "Requests of the guest to flush a disk.", |disk| disk.requests[2]),
    ];
    for (name, help, count) in counts {
        page.metric(&format!("flotilla_vm_block_{name}_total"), "counter", help);
        for (vm, sample) in samples {
            for (disk, transfers) in &sample.disks {
                page.value(&[("vm", vm), ("disk", disk)], count(transfers));
            }
        }
    }
}

fn vms(page: &mut Page, views: &[Arc<View>], usages: &Usages) {
    let each = |page: &mut Page, name: &str, kind: &str, help: &str, value: &dyn Fn(&View) -> u64| {
        page.metric(name, kind, help);
        for view in views {
            page.value(&[("vm", &view.name)], value(view));
        }
    };
    let up = |view: &View| u64::from(view.main_pid != 0);
    each(page, "flotilla_vm_up", "gauge", "1: its process runs.", &up);
    let answers = |view: &View| u64::from(view.responsive);
    each(page, "flotilla_vm_responsive", "gauge", "1: its VMM answers.", &answers);
    let restarts = |view: &View| view.restarts.into();
    each(page, "flotilla_vm_restarts", "gauge", "Restarts by policy in a row.", &restarts);
    let restarted = |view: &View| view.restarted.into();
    let help = "Restarts by policy since the daemon's start.";
    each(page, "flotilla_vm_restarts_total", "counter", help, &restarted);
    each(page, "flotilla_vm_memory_bytes", "gauge", "RAM, as defined.", &|view| view.spec.memory.0);
    each(page, "flotilla_vm_vcpus", "gauge", "vCPUs, as defined.", &|view| view.spec.cpus.into());

    let used = |page: &mut Page, name: &str, kind: &str, help: &str, value: &dyn Fn(&Usage) -> Number| {
        page.metric(name, kind, help);
        for (vm, usage) in usages {
            page.value(&[("vm", vm)], value(usage));
        }
    };
    let cpu = |usage: &Usage| Number::Real(usage.cpu_usec as f64 / 1e6);
    used(page, "flotilla_vm_cpu_seconds_total", "counter", "Processor time of its process.", &cpu);
    let resident = |usage: &Usage| Number::Whole(usage.resident);
    used(
        page,
        "flotilla_vm_resident_memory_bytes",
        "gauge",
        "Memory of its process that is there.",
        &resident,
    );
    let threads = |usage: &Usage| Number::Whole(usage.threads);
    used(page, "flotilla_vm_threads", "gauge", "Threads of its process.", &threads);
    for (at, name, help) in [
        (0, "flotilla_vm_disk_read_bytes_total", "Bytes that its process read from storage."),
        (1, "flotilla_vm_disk_written_bytes_total", "Bytes that its process wrote to storage."),
    ] {
        used(page, name, "counter", help, &|usage| Number::Whole(usage.disk[at]));
    }
    for (received, at, name, help) in [
        (true, 0, "flotilla_vm_network_received_bytes_total", "Bytes that a card of the guest received."),
        (true, 1, "flotilla_vm_network_received_packets_total", "Packets that a card of the guest received."),
        (false, 0, "flotilla_vm_network_sent_bytes_total", "Bytes that a card of the guest sent."),
        (false, 1, "flotilla_vm_network_sent_packets_total", "Packets that a card of the guest sent."),
    ] {
        page.metric(name, "counter", help);
        for (vm, usage) in usages {
            for (nic, traffic) in &usage.nics {
                let pair = if received { traffic.received } else { traffic.sent };
                page.value(&[("vm", vm), ("nic", nic)], pair[at]);
            }
        }
    }
}

/// A value.
enum Number {
    Whole(u64),
    Real(f64),
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            Self::Real(number) => number.fmt(f),
        }
    }
}

/// The page as it is written.
#[derive(Default)]
struct Page {
    text: String,
    /// The metric that was begun last.
    name: String,
}

impl Page {
    /// Begins a metric.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        name.clone_into(&mut self.name);
    }

    /// A line of the metric that was begun last.
    fn value(&mut self, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        self.text.push_str(&self.name);
        for (at, (label, text)) in labels.iter().enumerate() {
            self.text.push(if at == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            escape(&mut self.text, text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

/// Adds a label's value as the format wants it. There is one in each of a hundred thousand lines: nothing is copied on the way.
fn escape(page: &mut String, text: &str) {
    let mut rest = text;
    while let Some(at) = rest.find(['\\', '"', '\n']) {
        page.push_str(&rest[..at]);
        page.push('\\');
        page.push(if rest.as_bytes()[at] == b'\n' { 'n' } else { char::from(rest.as_bytes()[at]) });
        rest = &rest[at + 1..];
    }
    page.push_str(rest);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        for (text, wanted) in [
            ("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", Request::Metrics),
            ("GET / HTTP/1.0\n\n", Request::Metrics),
            ("GET /metrics?a=b HTTP/1.1\r\n\r\n", Request::Metrics),
            ("GET /other HTTP/1.1\r\n\r\n", Request::Other),
            ("GET /metrics HTTP/1.1\r\n", Request::Bad),
            ("POST /metrics HTTP/1.1\r\n\r\n", Request::Bad),
            ("GET /metrics\r\n\r\n", Request::Bad),
            ("", Request::Bad),
            ("\r\n\r\n", Request::Bad),
        ] {
            assert_eq!(parse(text.as_bytes()), wanted, "{text:?}");
        }
    }

    #[test]
    fn lines_are_as_prometheus_wants_them() {
        let mut page = Page::default();
        page.metric("a_total", "counter", "Some.");
        page.value(&[("vm", "a\"b\\c\n"), ("nic", "nic0")], 7);
        page.value(&[], 0.5);
        assert_eq!(
            page.text,
            "# HELP a_total Some.\n# TYPE a_total counter\na_total{vm=\"a\\\"b\\\\c\\n\",nic=\"nic0\"} 7\na_total 0.5\n"
        );
    }

    #[tokio::test]
    async fn a_request_ends_with_its_empty_line_or_its_room() {
        let (mut ours, mut theirs) = tokio::io::duplex(64 << 10);
        theirs.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        assert!(ends(&read_request(&mut ours).await.unwrap()));
        theirs.write_all(&vec![b'x'; REQUEST_MAX]).await.unwrap();
        assert_eq!(read_request(&mut ours).await.unwrap().len(), REQUEST_MAX);
    }
}
