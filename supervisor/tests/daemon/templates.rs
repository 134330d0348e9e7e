//! Templates and clones: what they leave, what needs what, what fails as a whole, and a daemon that is killed at any instant.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use zbus::Variant;

use crate::lab::{Lab, name_of, none};

/// A host with a VM that runs, with one disk that is written and one that is not.
async fn with_a_vm(append: &str) -> Lab {
    let lab = Lab::new().await;
    define(&lab, append).await;
    lab.start("web").await.unwrap();
    lab
}

async fn define(lab: &Lab, append: &str) {
    define_with(lab, append, json!([])).await;
}

async fn define_with(lab: &Lab, append: &str, nics: Value) {
    for name in ["disk", "cdrom"] {
        std::fs::File::create(lab.path(name)).unwrap().set_len(1 << 20).unwrap();
        std::fs::write(lab.path(name), name.repeat(1024)).unwrap();
    }
    let disks = json!([{ "path": lab.path("disk") }, { "path": lab.path("cdrom"), "readonly": true, "serial": "cd" }]);
    let members = json!({ "disks": disks, "nics": nics, "append": append, "labels": { "a": "b" } });
    lab.define("web", members).await.unwrap();
}

fn names(lab: &Lab, directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(lab.path(directory)).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

async fn make(lab: &Lab, name: &str, after: &str) -> Result<(), String> {
    let options = HashMap::from([("after", Variant::from(after))]);
    lab.job(lab.manager.create_template("web", name, options)).await
}

async fn clone(lab: &Lab, name: &str) -> Result<(), String> {
    let begun = async { lab.manager.clone_vm("base", name, none()).await.map(|(_, job)| job) };
    lab.job(begun).await
}

/// Clones that are all there; their names.
async fn clones(lab: &Lab, count: u32, pattern: &str, options: dbus_api::proxy::Options<'_>) -> Vec<String> {
    let mut begun = lab.manager.clone_vms("base", count, pattern, options).await.unwrap();
    let names = begun.iter().map(|row| row.0.clone()).collect();
    lab.settle(async || {
        let jobs: Vec<_> = lab.manager.list_jobs().await.unwrap().into_iter().map(|row| row.7).collect();
        begun.retain(|row| jobs.contains(&row.2));
        begun.is_empty()
    })
    .await;
    names
}

async fn spec(lab: &Lab, name: &str) -> Value {
    serde_json::from_str(&lab.vm(name).await.spec().await.unwrap()).unwrap()
}

#[tokio::test]
async fn a_template_is_made_cloned_and_removed() {
    let lab = with_a_vm("quiet").await;
    make(&lab, "base", "resume").await.unwrap();
    assert_eq!(lab.vm("web").await.state().await.unwrap(), "running");
    assert_eq!(names(&lab, "state/templates/base"), ["disk0", "disk1", "memory", "state", "template.json"]);
    // What is written to the VM's disk from now on is not in it.
    std::fs::OpenOptions::new().write(true).open(lab.path("disk")).unwrap().write_all_at(b"DISK", 0).unwrap();
    let row = lab.manager.list_templates().await.unwrap().remove(0);
    assert_eq!((row.0.as_str(), row.1.as_str(), row.4), ("base", "web", 0));
    lab.job(lab.manager.verify_template("base", none())).await.unwrap();
    assert!(make(&lab, "base", "resume").await.unwrap_err().contains("TemplateExists"));

    let options = HashMap::from([("user_data", Variant::from("#cloud-config\nx: 1\n"))]);
    let made = clones(&lab, 3, "w-%%", options).await;
    assert_eq!(made, ["w-01", "w-02", "w-03"]);
    let mut uuids = Vec::new();
    for name in &made {
        let vm = lab.vm(name).await;
        assert_eq!(vm.state().await.unwrap(), "running");
        let line = vm.command_line().await.unwrap().join(" ");
        let base = lab.path("state/templates/base");
        assert!(line.contains(&format!("-incoming file:{},identity=new", base.display())), "{line}");
        let spec = spec(&lab, name).await;
        assert_eq!((&spec["labels"]["a"], &spec["append"]), (&json!("b"), &json!("quiet")));
        assert_eq!(spec["disks"][1]["path"], json!(base.join("disk1")));
        assert_eq!(spec["disks"][2]["serial"], "flotilla-identity");
        let seed = std::fs::read(spec["disks"][2]["path"].as_str().unwrap()).unwrap();
        let seed = String::from_utf8_lossy(&seed).into_owned();
        assert!(seed.contains(&format!("\"local-hostname\": \"{name}\"")) && seed.contains("x: 1"));
        uuids.push(vm.uuid().await.unwrap());
    }
    uuids.sort();
    uuids.dedup();
    assert_eq!(uuids.len(), 3);
    // Names that are taken are left out; one by name is refused.
    assert_eq!(clones(&lab, 1, "w-%%", none()).await, ["w-04"]);
    let taken = lab.manager.clone_vm("base", "web", none()).await.unwrap_err();
    assert_eq!(name_of(&taken), "VmExists");

    // It is needed, whether they run or not; they start again as any VM does.
    assert_eq!(names(&lab, "state/clones/w-01").len(), 2);
    lab.job(lab.manager.power_off_vm("w-01", none())).await.unwrap();
    let needed = lab.manager.delete_template("base", none()).await.unwrap_err();
    assert_eq!(name_of(&needed), "TemplateInUse");
    assert!(needed.to_string().contains("w-01, w-02, w-03, w-04"), "{needed}");
    lab.start("w-01").await.unwrap();
    let line = lab.vm("w-01").await.command_line().await.unwrap().join(" ");
    assert!(!line.contains("-incoming") && line.contains("seed.img"), "{line}");
    let force = || HashMap::from([("force", Variant::from(true))]);
    for name in ["w-01", "w-02", "w-03", "w-04"] {
        lab.manager.undefine_vm(name, force()).await.unwrap();
        assert!(!lab.path("state/clones").join(name).exists());
    }
    lab.manager.delete_template("base", none()).await.unwrap();
    assert!(
        names(&lab, "state/templates").is_empty() && lab.manager.list_templates().await.unwrap().is_empty()
    );
    assert_eq!(name_of(&lab.manager.delete_template("base", none()).await.unwrap_err()), "NoSuchTemplate");
    assert_eq!(std::fs::read(lab.path("cdrom")).unwrap(), "cdrom".repeat(1024).into_bytes());
}

#[tokio::test]
async fn what_becomes_of_the_vm_is_as_asked() {
    let lab = with_a_vm("").await;
    for (name, after, state) in
        [("a", "pause", "paused"), ("b", "resume", "paused"), ("c", "stop", "stopped")]
    {
        make(&lab, name, after).await.unwrap();
        assert_eq!(lab.vm("web").await.state().await.unwrap(), state);
    }
    assert!(make(&lab, "d", "resume").await.unwrap_err().contains("it is stopped"));
    assert!(make(&lab, "d", "explode").await.unwrap_err().contains("InvalidArgs"));
    assert!(make(&lab, "../d", "stop").await.unwrap_err().contains("InvalidSpec"));
    assert_eq!(names(&lab, "state/templates"), ["a", "b", "c"]);
}

#[tokio::test]
async fn what_fails_leaves_nothing() {
    let mut lab = with_a_vm("fake=balloon").await;
    let error = make(&lab, "base", "stop").await.unwrap_err();
    assert!(error.contains("balloon: cannot be part of a snapshot"), "{error}");
    assert_eq!(lab.vm("web").await.state().await.unwrap(), "running");
    assert!(names(&lab, "state/templates").is_empty());
    // A clone whose process dies.
    lab.manager.undefine_vm("web", HashMap::from([("force", Variant::from(true))])).await.unwrap();
    define(&lab, "fake=lost").await;
    lab.start("web").await.unwrap();
    make(&lab, "base", "resume").await.unwrap();
    let error = clone(&lab, "lost").await.unwrap_err();
    assert!(error.starts_with("VmmDied"), "{error}");
    assert_eq!(lab.manager.list_vms().await.unwrap().len(), 1);
    assert!(names(&lab, "state/clones").is_empty());
    // A file that is not what was written.
    let memory = lab.path("state/templates/base/memory");
    std::fs::OpenOptions::new().write(true).open(memory).unwrap().write_all_at(b"T", 0).unwrap();
    let error = lab.job(lab.manager.verify_template("base", none())).await.unwrap_err();
    assert!(error.contains("memory: is not what was written"), "{error}");
    // One that is not as long as it was: the template is none any more, and stays to be looked at.
    std::fs::OpenOptions::new()
        .write(true)
        .open(lab.path("state/templates/base/state"))
        .unwrap()
        .set_len(3)
        .unwrap();
    lab.end_daemon(Signal::SIGTERM);
    lab.start_daemon().await;
    assert!(lab.manager.list_templates().await.unwrap().is_empty());
    assert!(lab.path("state/templates/base/disk0").exists());
}

/// Instants at which the daemon is killed: up to a little after its last step, the same in every run.
fn instants() -> impl Iterator<Item = Duration> {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        // xorshift64; early instants are as likely as late ones.
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        Duration::from_micros(100 << (seed % 10)) + Duration::from_micros(seed >> 32 & 0xfff)
    })
    .take(20)
}

/// Names of the VMs that are there, all of them running.
async fn running(lab: &Lab) -> Vec<String> {
    let mut names = Vec::new();
    for row in lab.manager.list_vms().await.unwrap() {
        lab.until(&row.0, "running").await;
        names.push(row.0);
    }
    names.sort();
    names
}

#[tokio::test]
async fn a_daemon_killed_at_any_instant_leaves_whole_things_only() {
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.start_daemon().await;
    lab.manager.define_network("lan", "{}", none()).await.unwrap();
    define_with(&lab, "", json!([{ "network": "lan" }])).await;
    lab.start("web").await.unwrap();
    make(&lab, "base", "resume").await.unwrap();
    for (round, instant) in instants().enumerate() {
        // Nobody waits for the answers: there may be none.
        let (manager, name) = (lab.manager.clone(), format!("t{round}"));
        let asked = tokio::spawn(async move {
            let _ = manager.create_template("web", &name, none()).await;
            let _ = manager.clone_vms("base", 3, "w-%", none()).await;
        });
        tokio::time::sleep(instant).await;
        lab.end_daemon(Signal::SIGKILL);
        asked.abort();
        lab.start_daemon().await;
        lab.settle(async || lab.manager.state().await.unwrap() != "starting").await;

        let about = |what: &str| format!("{what}, killed after {instant:?}:\n{}", lab.log());
        let half = |name: &String| lab.path("state/clones").join(name).join("making").exists();
        let clones = names(&lab, "state/clones");
        assert!(!clones.iter().any(half), "{}", about("a clone is half made"));
        let templates = names(&lab, "state/templates");
        assert!(!templates.iter().any(|name| name.starts_with('.')), "{}", about("a template is half made"));
        let vms = running(&lab).await;
        lab.until_responsive("web").await;
        assert!(vms.iter().any(|name| name == "web"), "{}", about("the VM is lost"));
        let cloned: Vec<_> = vms.iter().filter(|name| *name != "web").cloned().collect();
        assert_eq!(cloned, clones, "{}", about("clones and their directories"));
        let listed: Vec<String> =
            lab.manager.list_templates().await.unwrap().into_iter().map(|row| row.0).collect();
        assert_eq!(listed, templates, "{}", about("templates and their directories"));
        // Each VM has its tap and its process, and there are no others.
        let wanted: Vec<String> = vms.iter().map(|name| netsetup::tap_name(name, 0)).collect();
        lab.settle(async || {
            let ports = lab.ip("-o link show master flbr-lan");
            ports.lines().count() == wanted.len() && wanted.iter().all(|tap| ports.contains(tap))
        })
        .await;
        lab.settle(async || lab.processes() == vms.len()).await;

        for name in templates.iter().filter(|name| **name != "base") {
            lab.job(lab.manager.verify_template(name, none())).await.unwrap();
            lab.manager.delete_template(name, none()).await.unwrap();
        }
        for name in cloned {
            lab.manager.undefine_vm(&name, HashMap::from([("force", Variant::from(true))])).await.unwrap();
        }
    }
    lab.job(lab.manager.verify_template("base", none())).await.unwrap();
}
