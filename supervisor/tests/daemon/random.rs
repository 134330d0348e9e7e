//! Anybody calls anything with anything: ten thousand calls over all that the daemon's introspection shows, half of them as root and half as
//! an ordinary user. Each is answered, with a result or a named error; afterwards the host is as it was, and the daemon no larger.
//!
//! The seed is printed; `FLOTILLA_SEED=N` runs that one again.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::Duration;

use dbus_api::{BUS_NAME, MANAGER_PATH};
use serde_json::json;
use tokio::time::timeout;
use zbus::{Connection, DBusError, ObjectPath, OwnedObjectPath, Structure, Variant};

use crate::lab::{Lab, none};

/// Calls of each of the two.
const CALLS: usize = 5000;
/// Those before the daemon's memory is first looked at: caches and buffers have their size then.
const WARM: usize = 1500;
/// What it may have grown by from then to the end. All that the calls sent is far more.
const GROWTH: u64 = 24 << 20;
/// One call. Those that wait for a VMM have deadlines of their own, all shorter.
const ANSWER: Duration = Duration::from_secs(120);
/// `nobody` on every distribution.
const NOBODY: u32 = 65534;

/// xorshift64*: the same seed, the same calls.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % sides
    }

    fn of<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.roll(from.len())]
    }
}

/// A method or property, as introspection shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    interface: String,
    name: String,
    /// Types of what goes in; none for a property.
    arguments: Option<Vec<String>>,
}

fn attribute<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(&format!("{name}=\""))?.1.split('"').next()
}

/// Every object below `path` with its members.
async fn introspect(connection: &Connection) -> BTreeMap<String, BTreeSet<Member>> {
    let mut found = BTreeMap::new();
    let mut open = vec!["/".to_owned()];
    while let Some(path) = open.pop() {
        let asked = connection.call_method(
            Some(BUS_NAME),
            path.as_str(),
            Some("org.freedesktop.DBus.Introspectable"),
            "Introspect",
            &(),
        );
        // One that has gone meanwhile.
        let Ok(answer) = asked.await else { continue };
        let text: String = answer.body().deserialize().unwrap();
        let (mut interface, mut members, mut depth) = (String::new(), Vec::<Member>::new(), 0);
        for line in text.lines().map(str::trim) {
            if line.starts_with("<interface") {
                attribute(line, "name").unwrap().clone_into(&mut interface);
            } else if line.starts_with("<method") || line.starts_with("<property") {
                let arguments = line.starts_with("<method").then(Vec::new);
                let name = attribute(line, "name").unwrap().to_owned();
                members.push(Member { interface: interface.clone(), name, arguments });
                depth = usize::from(line.starts_with("<method") && !line.ends_with("/>"));
            } else if line.starts_with("</method") {
                depth = 0;
            } else if line.starts_with("<arg") && depth == 1 && attribute(line, "direction") != Some("out") {
                let arguments = members.last_mut().unwrap().arguments.as_mut().unwrap();
                arguments.push(attribute(line, "type").unwrap().to_owned());
            } else if line.starts_with("<node")
                && let Some(name) = attribute(line, "name")
            {
                open.push(format!("{}/{name}", path.trim_end_matches('/')));
            }
        }
        found.insert(path, members.into_iter().collect());
    }
    found
}

/// What callers send.
struct Caller<'a> {
    dice: Dice,
    home: &'a Path,
}

impl Caller<'_> {
    fn text(&mut self) -> String {
        let (dice, home) = (&mut self.dice, self.home.display());
        let known = ["web", "db", "r0", "r1", "r2", "net0", "t0", "run", "paused", "disk0", "nic0"];
        match dice.roll(12) {
            0..=4 => dice.of(&known).to_owned(),
            5 => {
                let evil = [
                    "",
                    ".",
                    "..",
                    "../web",
                    "web/../db",
                    "-rf",
                    "a b",
                    "a\nb",
                    "\u{202e}bew",
                    "\u{0}",
                    "%n%s",
                    "$(reboot)",
                    "web.",
                    "WEB",
                    "é",
                    "flotilla-vm@web",
                    "\u{1b}[2J",
                    "😀",
                    "0",
                    "18446744073709551616",
                ];
                dice.of(&evil).replace('\0', "\u{1}")
            }
            6 => dice.of(&["x", "/", "[", "{\"a\":", "é", "."]).repeat(1 << dice.roll(17)),
            7 => {
                let files = ["kernel", "disk", "image", "none", "fifo", "state", "run/flotilla", "log", "."];
                format!("{home}/{}", dice.of(&files))
            }
            8 => dice
                .of(&[
                    "/dev/zero",
                    "/dev/kvm",
                    "/proc/self/mem",
                    "/",
                    "/etc/shadow",
                    "/proc/kcore",
                    "relative",
                    "//",
                    "/dev/null",
                ])
                .to_owned(),
            9 => "00000000-0000-4000-8000-00000000000".to_owned() + dice.of(&["1", "2", "x", ""]),
            _ => self.json(),
        }
    }

    /// A definition, good or bad, or something else in JSON.
    fn json(&mut self) -> String {
        let home = self.home.display().to_string();
        let keys = [
            "kernel",
            "memory",
            "cpus",
            "disks",
            "nics",
            "labels",
            "append",
            "restart",
            "autostart",
            "limits",
            "machine",
            "firmware",
            "bridge",
            "path",
            "addresses",
            "mac",
            "uuid",
            "readonly",
            "isolated",
            "nat",
            "mtu",
            "serial",
            "iops",
            "network",
            "execute",
            "arguments",
            "size",
            "ssh_keys",
            "user_data",
            "dhcp",
        ];
        let mut object = serde_json::Map::new();
        if self.dice.roll(3) > 0 {
            object.insert("kernel".to_owned(), json!(format!("{home}/kernel")));
        }
        for _ in 0..self.dice.roll(4) {
            let key = self.dice.of(&keys);
            let value = match self.dice.roll(10) {
                0 => json!(null),
                1 => json!(u64::MAX),
                2 => json!(-1.5e300),
                3 => json!({"a": {"b": [1, "x", {}]}, "": ""}),
                4 => json!([{"path": format!("{home}/disk")}]),
                5 => json!([{"bridge": "flbr9"}]),
                6 => json!(["10.77.0.1/24"]),
                7 => json!(true),
                8 => json!("128M"),
                _ => json!({"tier": self.text(), "path": format!("{home}/disk"), "bridge": "flbr9"}),
            };
            object.insert(key.to_owned(), value);
        }
        let mut text = serde_json::Value::Object(object).to_string();
        if self.dice.roll(12) == 0 {
            let at =
                (0..=self.dice.roll(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
            text.truncate(at);
        }
        if self.dice.roll(20) == 0 {
            text = dice_qmp(&mut self.dice).to_owned();
        }
        text
    }

    fn options(&mut self) -> HashMap<String, Variant<'static>> {
        let keys = [
            "force",
            "timeout",
            "paused",
            "labels",
            "persist",
            "generation",
            "follow",
            "lines",
            "count",
            "after",
            "description",
            "start",
            "replace",
            "delete",
            "verify",
            "size",
            "disk-size",
            "",
            "nonsense",
            "remove-disks",
        ];
        (0..self.dice.roll(4)).map(|_| (self.dice.of(&keys).to_owned(), self.variant())).collect()
    }

    fn variant(&mut self) -> Variant<'static> {
        match self.dice.roll(8) {
            0 => Variant::from(self.dice.roll(2) == 0),
            1 => Variant::from(u64::MAX),
            2 => Variant::from(1_u32),
            3 => Variant::from(-1_i64),
            4 => Variant::from(2.5_f64),
            5 => Variant::from(vec![self.text()]),
            6 => Variant::from(HashMap::from([(self.text(), self.text())])),
            _ => Variant::from(self.text()),
        }
    }

    /// A value of this type, or nearly always.
    fn value(&mut self, kind: &str) -> Variant<'static> {
        if self.dice.roll(40) == 0 {
            return self.variant();
        }
        match kind {
            "s" => Variant::from(self.text()),
            // A great many of anything are asked for elsewhere; here they would only be slow.
            "u" => Variant::from(if self.dice.roll(4) == 0 {
                u32::MAX
            } else {
                u32::try_from(self.dice.roll(4)).unwrap()
            }),
            "t" => Variant::from(if self.dice.roll(4) == 0 { u64::MAX } else { 3 }),
            "b" => Variant::from(self.dice.roll(2) == 0),
            "as" => Variant::from((0..self.dice.roll(4)).map(|_| self.text()).collect::<Vec<_>>()),
            "o" => Variant::from(ObjectPath::try_from("/org/flotilla/Flotilla1/vm/web").unwrap()),
            "v" => Variant::Variant(Box::new(self.variant())),
            "a{sv}" => Variant::from(self.options()),
            other => panic!("no values of the type {other} are made here yet"),
        }
    }
}

fn dice_qmp(dice: &mut Dice) -> &'static str {
    dice.of(&[
        r#"{"execute":"query-status"}"#,
        r#"{"execute":"stop"}"#,
        r#"{"execute":"cont","id":[1,{"x":2}]}"#,
        r#"{"execute":"nope","arguments":{"a":"b"}}"#,
        r#"{"execute":"netdev_add","arguments":{"id":"x","type":"tap","ifname":"../../x"}}"#,
        r#"{"execute":7}"#,
        "[]",
        "nonsense",
    ])
}

/// An answer's error, by its name on the bus.
fn named(error: &zbus::Error) -> Option<(String, String)> {
    match error {
        zbus::Error::MethodError(name, text, _) => Some((name.to_string(), text.clone().unwrap_or_default())),
        zbus::Error::FDO(error) => {
            Some((error.name().to_string(), error.description().unwrap_or_default().to_owned()))
        }
        _ => None,
    }
}

/// Calls at random; returns how often each answer came.
async fn calls(connection: &Connection, seed: u64, home: &Path, count: usize) -> BTreeMap<String, usize> {
    let mut caller = Caller { dice: Dice(seed), home };
    let mut objects = introspect(connection).await;
    let mut answers = BTreeMap::new();
    for number in 0..count {
        // VMs, jobs and templates come and go.
        if number % 250 == 249 {
            objects = introspect(connection).await;
        }
        // The manager has most of the methods, and what every object has is soon seen.
        let at = caller.dice.roll(objects.len());
        let path =
            if caller.dice.roll(2) == 0 { MANAGER_PATH } else { objects.keys().nth(at).unwrap().as_str() };
        let common = caller.dice.roll(5) == 0;
        let wanted = |member: &&Member| common || !member.interface.starts_with("org.freedesktop.");
        let mut members: Vec<_> = objects[path].iter().filter(wanted).collect();
        if members.is_empty() {
            members = objects[path].iter().collect();
        }
        let member = members[caller.dice.roll(members.len())];
        let (interface, name, values) = match &member.arguments {
            Some(kinds) => {
                let values: Vec<_> = kinds.iter().map(|kind| caller.value(kind)).collect();
                (member.interface.as_str(), member.name.as_str(), values)
            }
            None => {
                let mut values =
                    vec![Variant::from(member.interface.clone()), Variant::from(member.name.clone())];
                let set = caller.dice.roll(3) == 0;
                if set {
                    values.push(caller.value("v"));
                }
                ("org.freedesktop.DBus.Properties", if set { "Set" } else { "Get" }, values)
            }
        };
        let told = format!("seed {seed}, call {number}: {path} {interface}.{name}");
        let (destination, interface) = (Some(BUS_NAME), Some(interface));
        let answer = if values.is_empty() {
            timeout(ANSWER, connection.call_method(destination, path, interface, name, &())).await
        } else {
            let body: Structure<'_> = values
                .into_iter()
                .fold(Structure::builder(), zbus::wire::StructureBuilder::append_field)
                .build()
                .unwrap();
            timeout(ANSWER, connection.call_method(destination, path, interface, name, &body)).await
        };
        let answer = match answer.unwrap_or_else(|_| panic!("{told}: no answer")) {
            Ok(_) => "a result".to_owned(),
            Err(error) => {
                let (name, text) = named(&error).unwrap_or_else(|| panic!("{told}: {error:?}"));
                let general = [
                    "InvalidArgs",
                    "UnknownMethod",
                    "UnknownObject",
                    "UnknownProperty",
                    "UnknownInterface",
                    "PropertyReadOnly",
                    "AccessDenied",
                    "NotSupported",
                ];
                let known = name.starts_with("org.flotilla.Flotilla1.Error.")
                    || name
                        .strip_prefix("org.freedesktop.DBus.Error.")
                        .is_some_and(|last| general.contains(&last));
                assert!(known, "{told}: {name} {text:?}");
                name
            }
        };
        *answers.entry(answer).or_default() += 1;
    }
    answers
}

/// A connection of an ordinary user, on a thread that is one: users belong to threads as the kernel sees it.
fn as_nobody(address: String, seed: u64, home: &Path, count: usize) -> BTreeMap<String, usize> {
    let home = home.to_owned();
    let thread = std::thread::spawn(move || {
        // SAFETY: changes the users of this thread only (the C library's wrapper would change those of all), and it ends with the calls.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
        assert_eq!(changed, 0, "this test needs root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let connection = zbus::connection::Builder::address(address.as_str()).build().await.unwrap();
            calls(&connection, seed, &home, count).await
        })
    });
    thread.join().unwrap()
}

/// What the daemon has on the host.
#[derive(Debug, PartialEq, Eq)]
struct Traces {
    files: BTreeSet<String>,
    links: String,
    descriptors: usize,
    processes: usize,
}

fn traces(lab: &Lab) -> Traces {
    let mut files = BTreeSet::new();
    let mut open = vec![lab.path("state"), lab.path("run")];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().flatten() {
            files.insert(entry.path().display().to_string());
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
        }
    }
    let links = lab
        .ip("-br link show")
        .lines()
        .filter_map(|line| line.split([' ', '@']).next())
        .collect::<Vec<_>>()
        .join(" ");
    Traces { files, links, descriptors: lab.descriptors(), processes: lab.processes() }
}

/// Takes away what calls have made, by calls.
async fn clean(lab: &Lab) {
    let _ = lab.manager.undrain().await;
    for row in lab.manager.list_jobs().await.unwrap() {
        let _ = lab.manager.cancel_job(row.0).await;
    }
    lab.settle(async || lab.manager.list_jobs().await.unwrap().is_empty()).await;
    for row in lab.manager.list_vms().await.unwrap() {
        if !["defined", "stopped", "failed"].contains(&row.2.as_str()) {
            let _ = lab.job(lab.manager.power_off_vm(&row.0, none())).await;
        }
        lab.manager.undefine_vm(&row.0, none()).await.unwrap();
    }
    for row in lab.manager.list_templates().await.unwrap() {
        lab.manager.delete_template(&row.0, none()).await.unwrap();
    }
    for row in lab.manager.list_networks().await.unwrap() {
        lab.manager.delete_network(&row.0).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anybody_may_call_anything_with_anything() {
    let seed = std::env::var("FLOTILLA_SEED").map_or_else(
        |_| {
            u64::from(std::process::id()) << 32
                | u64::from(std::time::UNIX_EPOCH.elapsed().unwrap().subsec_nanos())
        },
        |seed| seed.parse().unwrap(),
    ) | 1;
    println!("FLOTILLA_SEED={seed}");
    let mut lab = Lab::bare().await;
    lab.own_network();
    lab.start_daemon().await;
    lab.settle(async || lab.manager.state().await.unwrap() != "starting").await;
    for (name, length) in [("disk", 1 << 20), ("image", 1 << 16)] {
        std::fs::File::create(lab.path(name)).unwrap().set_len(length).unwrap();
    }
    nix::unistd::mkfifo(&lab.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let home = lab.path("");

    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let (root, user) = (calls(lab.connection(), seed, &home, WARM), {
        let (address, home) = (lab.address().to_owned(), home.clone());
        tokio::task::spawn_blocking(move || as_nobody(address, seed ^ 2, &home, WARM))
    });
    let _ = tokio::join!(root, user);
    clean(&lab).await;
    let before = (traces(&lab), lab.memory());

    lab.define("web", json!({})).await.unwrap();
    lab.start("web").await.unwrap();
    let (root, user) = (calls(lab.connection(), seed ^ 4, &home, CALLS), {
        let (address, home) = (lab.address().to_owned(), home.clone());
        tokio::task::spawn_blocking(move || as_nobody(address, seed ^ 6, &home, CALLS))
    });
    let (root, user) = tokio::join!(root, user);
    println!("root: {root:?}\nan ordinary user: {:?}", user.as_ref().unwrap());
    // Most of it got as far as to be judged.
    assert!(user.unwrap()["org.flotilla.Flotilla1.Error.AccessDenied"] > CALLS / 20);
    assert!(root["a result"] > CALLS / 20);
    clean(&lab).await;
    lab.settle(async || traces(&lab) == before.0).await;
    let memory = lab.memory();
    assert!(
        memory < before.1 + GROWTH,
        "seed {seed}: the daemon has grown from {} to {memory} bytes",
        before.1
    );
    // And it is as good as new.
    let _: OwnedObjectPath = lab
        .manager
        .define_vm("web", &json!({"kernel": lab.path("kernel")}).to_string(), none())
        .await
        .unwrap()
        .0;
    lab.start("web").await.unwrap();
}
