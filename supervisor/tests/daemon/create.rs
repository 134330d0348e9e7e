//! VMs that are made from an image: what they have, what they lean on, what fails as a whole, and a daemon that is killed meanwhile.

use std::collections::HashMap;
use std::path::Path;

use dbus_api::proxy::Options;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use zbus::Variant;

use crate::lab::{Lab, name_of, none};

/// A host with an image, and with firmware.
async fn with_an_image() -> Lab {
    let lab = Lab::bare().await;
    std::fs::write(lab.path("image"), vec![7; 1 << 20]).unwrap();
    for name in ["code", "vars"] {
        std::fs::write(lab.path(name), name.repeat(1024)).unwrap();
    }
    let text = format!("[firmware]\ncode = {:?}\nvars = {:?}\n", lab.path("code"), lab.path("vars"));
    std::fs::write(lab.path("flotillad.toml"), text).unwrap();
    let mut lab = lab;
    lab.start_daemon().await;
    lab
}

async fn create(lab: &Lab, name: &str, spec: Value, options: Options<'_>) -> Result<(), String> {
    let (spec, image) = (spec.to_string(), lab.path("image"));
    let begun = async {
        let begun = lab.manager.create_vm(name, &spec, image.to_str().unwrap(), options).await;
        begun.map(|(_, job)| job)
    };
    lab.job(begun).await
}

async fn spec(lab: &Lab, name: &str) -> Value {
    serde_json::from_str(&lab.vm(name).await.spec().await.unwrap()).unwrap()
}

fn file(value: &Value) -> &Path {
    Path::new(value.as_str().unwrap())
}

#[tokio::test]
async fn a_vm_comes_of_an_image_and_goes_with_its_disk() {
    let lab = with_an_image().await;
    let keys = vec!["ssh-ed25519 AAAA me".to_owned()];
    let options =
        || HashMap::from([("size", Variant::from(8_u64 << 20)), ("ssh_keys", Variant::from(keys.clone()))]);
    create(&lab, "web", json!({ "memory": "1G", "labels": { "a": "b" } }), options()).await.unwrap();
    let vm = lab.vm("web").await;
    assert_eq!(vm.state().await.unwrap(), "running");
    let line = vm.command_line().await.unwrap().join(" ");
    for part in
        ["-machine q35", "if=pflash,unit=0,readonly=on", "if=pflash,unit=1", "bootindex=0", "-m 1024M"]
    {
        assert!(line.contains(part), "{part}: {line}");
    }
    let made = spec(&lab, "web").await;
    let home = lab.path("state/clones/web");
    assert_eq!(made["firmware"], json!({ "code": lab.path("code"), "vars": home.join("vars.fd") }));
    assert_eq!(std::fs::read(home.join("vars.fd")).unwrap(), std::fs::read(lab.path("vars")).unwrap());
    assert!(file(&made["disks"][0]["path"]).starts_with(&home));
    let seed = std::fs::read(file(&made["disks"][1]["path"])).unwrap();
    let seed = String::from_utf8_lossy(&seed).into_owned();
    for part in ["\"local-hostname\": \"web\"", "ssh-ed25519 AAAA me"] {
        assert!(seed.contains(part), "{part}");
    }
    // Everything was handed over: the VMM has a right to none of it.
    let handed = vm.qmp_command("\"x-fds\"", none()).await.unwrap();
    for part in ["/code", "/vars.fd", "/seed.img"] {
        assert!(handed.contains(part), "{part}: {handed}");
    }
    assert!(!home.join("making").exists());
    assert!(create(&lab, "web", json!({}), none()).await.unwrap_err().contains("VmExists"));

    lab.manager.undefine_vm("web", HashMap::from([("force", Variant::from(true))])).await.unwrap();
    assert!(!home.exists() && lab.path("image").exists());
}

#[tokio::test]
async fn a_disk_of_its_own_and_a_kernel_if_asked() {
    let lab = with_an_image().await;
    let options = HashMap::from([("whole", Variant::from(true)), ("start", Variant::from(false))]);
    create(&lab, "tiny", json!({ "kernel": lab.path("kernel") }), options).await.unwrap();
    let made = spec(&lab, "tiny").await;
    assert_eq!(lab.vm("tiny").await.state().await.unwrap(), "defined");
    assert_eq!((&made["machine"], made.get("firmware")), (&json!("microvm"), None));
    let disk = &made["disks"][0];
    assert!(disk.get("backing").is_none(), "{disk}");
    assert_eq!(std::fs::read(file(&disk["path"])).unwrap(), std::fs::read(lab.path("image")).unwrap());
    lab.start("tiny").await.unwrap();
}

#[tokio::test]
async fn what_fails_leaves_nothing() {
    let mut lab = with_an_image().await;
    let image = lab.path("image").display().to_string();
    for (spec, image, options, name, word) in [
        (json!({}), "image", none(), "InvalidSpec", "absolute"),
        (json!({}), "/nonexistent", none(), "InvalidSpec", "no such file"),
        (json!({ "machine": "microvm" }), &image, none(), "InvalidSpec", "kernel"),
        (json!({ "memroy": 1 }), &image, none(), "InvalidSpec", "memroy"),
        (json!([]), "/", none(), "InvalidSpec", ""),
        (json!({}), &image, HashMap::from([("size", Variant::from(512_u64))]), "InvalidSpec", "size"),
        (json!({}), &image, HashMap::from([("format", Variant::from("vmdk"))]), "ZBus", "vmdk"),
        (json!({}), &image, HashMap::from([("sise", Variant::from(1_u64))]), "ZBus", "sise"),
        (
            json!({}),
            &image,
            HashMap::from([("ssh_keys", Variant::from(vec!["a\nb"]))]),
            "InvalidSpec",
            "ssh_keys",
        ),
    ] {
        let error = lab.manager.create_vm("web", &spec.to_string(), image, options).await.unwrap_err();
        assert_eq!(name_of(&error), name, "{error}");
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    // The job itself fails: its VMM ends at once, and its variables cannot be copied.
    let dies = json!({ "kernel": lab.path("kernel"), "append": "fake=die" });
    assert!(create(&lab, "web", dies, none()).await.is_err());
    std::fs::remove_file(lab.path("vars")).unwrap();
    let failed = create(&lab, "web", json!({}), none()).await.unwrap_err();
    assert!(failed.contains("StoreFailed") && failed.contains("vars"), "{failed}");
    assert_eq!(lab.manager.list_vms().await.unwrap().len(), 0);
    assert_eq!(std::fs::read_dir(lab.path("state/clones")).unwrap().count(), 0);

    // As a killed daemon leaves it: the directory is there, the VM is not.
    let left = lab.path("state/clones/web");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("making"), "00000000-0000-0000-0000-000000000007\n").unwrap();
    std::fs::write(left.join("image.raw"), "half").unwrap();
    lab.end_daemon(Signal::SIGKILL);
    lab.start_daemon().await;
    lab.settle(async || !left.exists()).await;
    std::fs::write(lab.path("vars"), "v").unwrap();
    create(&lab, "web", json!({}), none()).await.unwrap();
}
