//! Jobs that are cancelled, and logs that are read over D-Bus.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::net::UnixStream;

use dbus_api::proxy::{JobProxy, Options};
use serde_json::json;
use zbus::Variant;

use crate::lab::{Lab, PATIENCE, name_of, none};

#[tokio::test]
async fn a_start_that_hangs_is_cancelled_and_leaves_no_process() {
    let lab = Lab::new().await;
    lab.define("web", json!({"append": "fake=mute"})).await.unwrap();
    let ended = lab.job(async {
        let job = lab.manager.start_vm("web", "run", none()).await?;
        let object = JobProxy::builder(lab.connection()).path(job.clone()).build().await.unwrap();
        assert_eq!(object.kind().await.unwrap(), "start");
        object.cancel().await?;
        Ok(job)
    });
    assert_eq!(ended.await.unwrap_err(), "Cancelled: VM \"web\": it was cancelled");
    lab.until("web", "stopped").await;
    lab.settle(async || lab.processes() == 0).await;
    assert_eq!(lab.vm("web").await.intent().await.unwrap(), "stopped");
    let missing = lab.manager.cancel_job(4711).await.unwrap_err();
    assert_eq!(name_of(&missing), "NoSuchJob");
    lab.define("web2", json!({})).await.unwrap();
    lab.start("web2").await.unwrap();
}

#[tokio::test]
async fn a_vm_that_is_being_made_is_cancelled_and_nothing_is_left() {
    let lab = Lab::new().await;
    std::fs::write(lab.path("image"), vec![7; 1 << 20]).unwrap();
    let (spec, image) = (json!({"kernel": lab.path("kernel"), "append": "fake=mute"}), lab.path("image"));
    // It hangs in its start, which is cancelled as well.
    let ended = lab.job(async {
        let (_, job) =
            lab.manager.create_vm("web", &spec.to_string(), image.to_str().unwrap(), none()).await?;
        let starting = async || lab.vm("web").await.state().await.is_ok_and(|state| state == "starting");
        lab.settle(starting).await;
        let id: u32 = job.as_str().rsplit('/').next().unwrap().parse().unwrap();
        lab.manager.cancel_job(id).await?;
        Ok(job)
    });
    assert!(ended.await.unwrap_err().starts_with("Cancelled: "));
    assert!(lab.manager.list_vms().await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(lab.path("state/clones")).unwrap().count(), 0);
}

fn options<'a>(follow: bool) -> Options<'a> {
    HashMap::from([("follow", Variant::from(follow)), ("lines", Variant::from(50_u64))])
}

/// Reads until the text is there, or the log ends.
async fn read_until(stream: UnixStream, text: &'static str) -> (UnixStream, String) {
    let read = tokio::task::spawn_blocking(move || {
        let (mut stream, mut seen, mut piece) = (stream, String::new(), [0; 1024]);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        while text.is_empty() || !seen.contains(text) {
            match stream.read(&mut piece).unwrap() {
                0 => break,
                count => seen += &String::from_utf8_lossy(&piece[..count]),
            }
        }
        (stream, seen)
    });
    read.await.unwrap()
}

#[tokio::test]
async fn a_log_is_read_to_its_end_or_followed_until_the_reader_leaves() {
    let lab = Lab::new().await;
    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let vm = lab.vm("web").await;
    let open = async |follow: bool| {
        let (stream, kind) = vm.open_log(options(follow)).await.unwrap();
        assert_eq!(kind, "socket");
        UnixStream::from(std::os::fd::OwnedFd::from(stream))
    };
    let followed = open(true).await;
    assert_eq!(lab.children("tail"), 1);
    // It dies on purpose, and says so.
    let _ = vm.qmp_command("\"x-crash\"", none()).await;
    let (followed, seen) = read_until(followed, "fake: I die").await;
    assert!(seen.contains("fake: I die"), "{seen}");
    let (_, whole) = read_until(open(false).await, "").await;
    assert!(whole.contains("fake: I die"), "{whole}");
    lab.settle(async || lab.children("tail") == 1).await;
    // Nothing is logged any more, and its reader's leaving is seen all the same.
    drop(followed);
    lab.settle(async || lab.children("tail") == 0).await;
    for (name, value) in [("lines", Variant::from("all")), ("fellow", Variant::from(true))] {
        assert!(vm.open_log(HashMap::from([(name, value)])).await.is_err(), "{name}");
    }
    // A reader that opens without end is refused, not served without end.
    let mut open = Vec::new();
    let refused = loop {
        match vm.open_log(options(true)).await {
            Ok(stream) => open.push(stream),
            Err(error) => break error,
        }
        assert!(open.len() < 1000);
    };
    assert_eq!(name_of(&refused), "ResourceExhausted");
    drop(open);
    lab.settle(async || lab.children("tail") == 0).await;
}
