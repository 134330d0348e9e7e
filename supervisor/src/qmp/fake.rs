//! A VMM without a VM, for tests: listens, greets, and does what the test says, right or wrong.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::codec::Framer;
use super::monitor::Monitor;

/// Long enough for a loaded machine, short enough to notice a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const GREETING: &str = "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":1,\"minor\":0,\"major\":5},\"package\":\"fake-1\"},\"capabilities\":[]}}\r\n";

/// A VMM that listens.
pub(crate) struct FakeVmm {
    pub(crate) directory: TempDir,
    listener: UnixListener,
}

/// One side of a QMP connection: the VMM's, or a client's.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
    framer: Framer,
}

impl FakeVmm {
    pub(crate) fn new() -> FakeVmm {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("qmp.sock")).unwrap();
        FakeVmm { directory, listener }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("qmp.sock")
    }

    /// Takes a connection and does nothing with it.
    pub(crate) async fn accept(&self) -> Peer {
        let accepted = tokio::time::timeout(PATIENCE, self.listener.accept()).await.expect("nobody connects");
        Peer::new(accepted.unwrap().0)
    }

    /// Takes a connection as far as the first command, and returns both of its ends.
    pub(crate) async fn monitor(&self) -> (Monitor, Peer) {
        let path = self.path();
        let (monitor, vmm) = tokio::join!(Monitor::connect(&path, PATIENCE), async {
            let mut vmm = self.accept().await;
            vmm.send(GREETING).await;
            let request = vmm.message().await;
            assert_eq!(request["execute"], "qmp_capabilities");
            vmm.answer(&request, json!({})).await;
            vmm
        });
        (monitor.unwrap(), vmm)
    }

    /// A monitor and a VMM that answers every command at once with what it was.
    pub(crate) async fn echo(&self) -> Monitor {
        let (monitor, vmm) = self.monitor().await;
        tokio::spawn(vmm.echo());
        monitor
    }
}

impl Peer {
    pub(crate) fn new(stream: UnixStream) -> Peer {
        Peer { stream, framer: Framer::new(64 << 20) }
    }

    /// Connects as a client and reads the greeting.
    pub(crate) async fn connect(path: &Path) -> (Peer, Value) {
        let mut peer = Peer::new(UnixStream::connect(path).await.unwrap());
        let greeting = peer.message().await;
        (peer, greeting)
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = tokio::time::timeout(PATIENCE, self.stream.write_all(bytes.as_ref())).await;
        sent.expect("the other side does not read").unwrap();
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        self.raw().await.map(|frame| serde_json::from_slice(&frame).unwrap())
    }

    /// The next message as it was written.
    pub(crate) async fn raw(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some(frame) = self.framer.next() {
                return Some(frame.unwrap_or_else(|flaw| panic!("{flaw:?}")));
            }
            let mut buffer = vec![0; 64 << 10];
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut buffer)).await;
            match read.expect("the other side says nothing") {
                Ok(0) | Err(_) => return None,
                Ok(got) => self.framer.push(&buffer[..got], got == buffer.len()),
            }
        }
    }

    pub(crate) async fn message(&mut self) -> Value {
        self.next().await.expect("the connection ended")
    }

    /// Sends a text and returns the answer to it.
    pub(crate) async fn ask(&mut self, text: &str) -> Value {
        self.send(text).await;
        self.message().await
    }

    pub(crate) async fn answer(&mut self, request: &Value, value: Value) {
        self.send(format!("{}\r\n", json!({"return": value, "id": request["id"]}))).await;
    }

    pub(crate) async fn event(&mut self, name: &str, data: Value) {
        let event = json!({"event": name, "data": data, "timestamp": {"seconds": 3, "microseconds": 7}});
        self.send(format!("{event}\r\n")).await;
    }

    /// Answers every command with its own text, until the other side hangs up.
    pub(crate) async fn echo(mut self) {
        while let Some(request) = self.next().await {
            let value = json!({"execute": request["execute"], "arguments": request["arguments"]});
            self.answer(&request, value).await;
        }
    }
}
