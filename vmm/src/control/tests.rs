//! Commands and their outcomes, in order, over a machine that does nothing.

use std::sync::Arc;

use super::*;
use crate::event::EventLoop;
use crate::machine::{CpuInfo, Departure, NetDevice};
use crate::snapshot::Target;
use crate::virtio::mem;

#[derive(Default)]
struct FakeVm {
    fails: bool,
    unsaveable: bool,
    mem: Option<Arc<mem::Port>>,
}

impl Vm for FakeVm {
    fn peek(&self, address: u64) -> Option<u32> {
        (address < 1 << 28).then(|| address as u32 + 0xab)
    }
    fn pause(&mut self) -> Result<(), BoxError> {
        if self.fails { Err("vCPU 0 did not stop".into()) } else { Ok(()) }
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.pause()
    }
    fn cpus(&self) -> Vec<CpuInfo> {
        vec![CpuInfo { index: 0, socket_id: 0, die_id: 0, core_id: 0, thread_id: 0, host_tid: 42 }]
    }
    fn balloon(&self) -> Option<u64> {
        (!self.fails).then_some(1 << 28)
    }
    fn set_balloon(&mut self, _: u64) {}
    fn memory_device(&self, id: &str) -> Option<Arc<mem::Port>> {
        self.mem.clone().filter(|_| id == "mem0")
    }
    fn reset(&mut self) -> Result<(), BoxError> {
        self.pause()
    }
    fn press_power_button(&mut self) {}
    fn hotplug(&mut self, request: Hotplug) -> Result<Plugged, HotplugError> {
        match request {
            Hotplug::Unplug(id) if self.fails => Err(SlotRefusal::NoDevice(id).into()),
            _ if self.fails => Err(HotplugError::NoSlots),
            Hotplug::Plug(new) if new.cpu_id.is_some() => Ok(Plugged::CpusResized),
            _ => Ok(Plugged::Done),
        }
    }
    fn device_left(&mut self, _: &Departure) -> Option<String> {
        None
    }
    fn block_devices(&self) -> Vec<BlockDevice> {
        Vec::new()
    }
    fn net_devices(&self) -> Vec<NetDevice> {
        Vec::new()
    }
    fn devices(&self) -> Vec<(String, &'static str)> {
        Vec::new()
    }
    fn iothreads(&self) -> Vec<(String, i32)> {
        vec![("io1".into(), 43)]
    }
    fn save(&mut self, _: &Target) -> Result<(), BoxError> {
        if self.unsaveable { Err("the disk is full".into()) } else { Ok(()) }
    }
    fn shut_down(self: Box<Self>) -> Result<(), BoxError> {
        Ok(())
    }
}

fn control(config: &VmConfig, fails: bool) -> (Control, EventLoop) {
    let event_loop = EventLoop::new().unwrap();
    (Control::new(Box::new(FakeVm { fails, ..FakeVm::default() }), config, event_loop.handle()), event_loop)
}

/// Events as their names, replies as JSON or the error's text.
fn names(outcomes: &[Outcome]) -> Vec<String> {
    let name = |o: &Outcome| match o {
        Outcome::Event(e) => format!("{} {}", e.name, e.data),
        Outcome::Reply(Ok(v)) => v.to_string(),
        Outcome::Reply(Err(e)) => format!("error: {e}"),
    };
    outcomes.iter().map(name).collect()
}

#[test]
fn stop_and_cont_tell_before_they_answer_and_refuse_a_second_time() {
    let (mut control, _loop) = control(&VmConfig::default(), false);
    assert_eq!(names(&control.execute(Command::Cont)), ["error: the VM is running already"]);
    assert_eq!(names(&control.execute(Command::Stop)), ["STOP {}", "{}"]);
    assert_eq!(names(&control.execute(Command::Stop)), ["error: the VM is paused already"]);
    assert_eq!(
        names(&control.execute(Command::QueryStatus)),
        [r#"{"running":false,"singlestep":false,"status":"paused"}"#]
    );
    assert_eq!(names(&control.execute(Command::Cont)), ["RESUME {}", "{}"]);
}

#[test]
fn a_vm_created_paused_is_started_by_cont() {
    let (mut control, _loop) = control(&VmConfig { start_paused: true, ..Default::default() }, false);
    assert_eq!(names(&control.execute(Command::Stop)), ["error: the VM is paused already"]);
    assert_eq!(names(&control.execute(Command::Cont)), ["RESUME {}", "{}"]);
}

#[test]
fn what_guest_memory_holds_is_told_in_hexadecimal_digits() {
    let (mut control, _loop) = control(&VmConfig::default(), false);
    assert_eq!(names(&control.execute(Command::QueryMemGpa(0x100_0000))), [r#""10000AB""#]);
    assert_eq!(
        names(&control.execute(Command::QueryMemGpa(u64::MAX))),
        ["error: there is no guest RAM at 0xffffffffffffffff"]
    );
}

#[test]
fn vcpus_that_come_are_told_of_behind_the_answer() {
    let (mut control, _loop) = control(&VmConfig::default(), false);
    let cpu = NewDevice { id: "vcpu-1".into(), cpu_id: Some(1), ..NewDevice::default() };
    assert_eq!(names(&control.execute(Command::DeviceAdd(Box::new(cpu)))), ["{}", "CPU_RESIZE {}"]);
}

#[test]
fn quit_answers_before_it_tells_and_ends_the_loop() {
    let (mut control, mut event_loop) = control(&VmConfig::default(), false);
    let outcomes = control.execute(Command::Quit);
    assert_eq!(names(&outcomes), ["{}", r#"SHUTDOWN {"guest":false,"reason":"host-qmp-quit"}"#]);
    event_loop.run().unwrap();
    assert_eq!(control.end(), Some(&End::Quit));
    assert_eq!(names(&control.execute(Command::Cont)), ["error: the VM has ended"]);
    assert!(control.happened(&Input::Signal(15)).is_empty());
}

#[test]
fn a_machine_that_fails_leaves_the_state_alone() {
    let (mut control, _loop) = control(&VmConfig::default(), true);
    for _ in 0..2 {
        assert_eq!(
            names(&control.execute(Command::Stop)),
            ["error: cannot pause the VM: vCPU 0 did not stop"]
        );
    }
}

#[test]
fn a_reset_answers_before_it_tells_and_leaves_a_paused_vm_paused() {
    let (mut works, _loop) = control(&VmConfig::default(), false);
    let reset = [r#"{}"#, r#"RESET {"guest":true}"#];
    assert_eq!(names(&works.execute(Command::SystemReset)), reset);
    works.execute(Command::Stop);
    assert_eq!(names(&works.execute(Command::SystemReset)), reset);
    assert_eq!(names(&works.execute(Command::Cont)), ["RESUME {}", "{}"]);
    assert_eq!(names(&works.execute(Command::SystemPowerdown)), ["{}", "POWERDOWN {}"]);
    let config = VmConfig { start_paused: true, ..Default::default() };
    let (mut fails, _loop) = control(&config, true);
    assert_eq!(
        names(&fails.execute(Command::SystemReset)),
        [
            "error: cannot reset the VM: vCPU 0 did not stop",
            r#"SHUTDOWN {"guest":false,"reason":"host-error"}"#
        ]
    );
}

#[test]
fn a_device_that_goes_is_told_before_the_answer() {
    let (mut works, _loop) = control(&VmConfig::default(), false);
    assert_eq!(
        names(&works.execute(Command::DeviceDel("d".into()))),
        [r#"DEVICE_DELETED {"device":"d","path":"d"}"#, "{}"]
    );
    assert_eq!(names(&works.execute(Command::BlockdevDel("d".into()))), ["{}"]);
    let (mut fails, _loop) = control(&VmConfig::default(), true);
    let outcomes = fails.execute(Command::DeviceDel("d".into()));
    assert_eq!(names(&outcomes), ["error: Device d not found"]);
    assert!(matches!(&outcomes[..], [Outcome::Reply(Err(CommandError::NotFound(_)))]));
}

#[test]
fn each_end_has_its_reason() {
    for (input, want) in [
        (Input::Guest(GuestEvent::PowerOff), r#"SHUTDOWN {"guest":true,"reason":"guest-shutdown"}"#),
        (Input::Guest(GuestEvent::TripleFault), r#"SHUTDOWN {"guest":true,"reason":"guest-shutdown"}"#),
        (Input::Guest(GuestEvent::Reset), r#"SHUTDOWN {"guest":true,"reason":"guest-reset"}"#),
        (
            Input::Guest(GuestEvent::InternalError("x".to_owned())),
            r#"SHUTDOWN {"guest":false,"reason":"host-error"}"#,
        ),
        (Input::Signal(15), r#"SHUTDOWN {"guest":false,"reason":"Guest shutdown by signal 15"}"#),
    ] {
        let (mut control, _loop) = control(&VmConfig::default(), false);
        assert_eq!(names(&control.happened(&input)), [want]);
    }
}

#[test]
fn hotpluggable_cpus_lists_those_that_are_offline_without_a_path() {
    let smp = Smp { cpus: 1, max_cpus: 4, sockets: 2, dies: 1, clusters: 1, cores: 1, threads: 2 };
    let (mut control, _loop) = control(&VmConfig { smp, ..Default::default() }, false);
    let Some(Outcome::Reply(Ok(cpus))) = control.execute(Command::QueryHotpluggableCpus).pop() else {
        panic!()
    };
    assert_eq!(cpus[0]["qom-path"], "/machine/unattached/device[0]");
    assert_eq!(
        cpus[3],
        json!({"props": {"socket-id": 1, "die-id": 0, "die_id": 0, "core-id": 0, "thread-id": 1},
               "type": "host-x86-cpu", "vcpus-count": 1})
    );
    assert_eq!(cpus.as_array().unwrap().len(), 4);
}

#[test]
fn a_snapshot_pauses_a_vm_that_runs_and_one_that_fails_does_not() {
    let event_loop = EventLoop::new().unwrap();
    let migrate = || Command::Migrate { uri: "file:/snapshot".into(), descriptors: Vec::new() };
    let status = |control: &mut Control| names(&control.execute(Command::QueryMigrate)).remove(0);
    let machine = |unsaveable| Box::new(FakeVm { unsaveable, ..FakeVm::default() });
    let mut works = Control::new(machine(false), &VmConfig::default(), event_loop.handle());
    assert_eq!(status(&mut works), r#"{"status":"setup"}"#);
    assert_eq!(names(&works.execute(migrate())), ["STOP {}", "{}"]);
    assert_eq!(status(&mut works), r#"{"status":"completed"}"#);
    assert_eq!(names(&works.execute(Command::Stop)), ["error: the VM is paused already"]);
    assert_eq!(names(&works.execute(migrate())), ["{}"]);
    assert_eq!(names(&works.execute(Command::Cont)), ["RESUME {}", "{}"]);
    let mut fails = Control::new(machine(true), &VmConfig::default(), event_loop.handle());
    for _ in 0..2 {
        assert_eq!(names(&fails.execute(migrate())), ["error: cannot make a snapshot: the disk is full"]);
        assert_eq!(status(&mut fails), r#"{"status":"failed"}"#);
        assert_eq!(names(&fails.execute(Command::Cont)), ["error: the VM is running already"]);
    }
}

/// 1 GiB that is not there.
struct Nowhere;

impl mem::Store for Nowhere {
    fn base(&self) -> u64 {
        1 << 32
    }
    fn size(&self) -> u64 {
        1 << 30
    }
    fn chunk(&self) -> u64 {
        1 << 27
    }
    fn expose(&self, _: usize, _: bool) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn memory_is_asked_for_in_blocks_and_shown_as_it_stands() {
    let event_loop = EventLoop::new().unwrap();
    let device = mem::Mem::new(mem::MemOptions {
        store: Arc::new(Nowhere),
        block_size: 2 << 20,
        node: None,
        requested_size: 0,
        worker: crate::virtio::Worker::new("t"),
    });
    let vm = FakeVm { mem: Some(device.port()), ..FakeVm::default() };
    let mut control = Control::new(Box::new(vm), &VmConfig::default(), event_loop.handle());
    let set = |control: &mut Control, id: &str, size| {
        names(&control.execute(Command::SetViomem { id: id.to_owned(), size })).remove(0)
    };
    assert_eq!(set(&mut control, "mem0", 64 << 20), "{}");
    assert_eq!(
        names(&control.execute(Command::GetViomem("mem0".into()))),
        [r#"{"block-size":2097152,"node":0,"plugged-size":0,"requested-size":67108864,"size":1073741824}"#]
    );
    assert!(set(&mut control, "mem0", 1).contains("is not a multiple of block-size, 2097152 bytes"));
    assert!(set(&mut control, "mem0", 2 << 30).contains("is more than the device has, 1073741824 bytes"));
    assert!(set(&mut control, "mem1", 0).starts_with("error: Device mem1 not found"));
    let unknown = control.execute(Command::GetViomem("mem1".into()));
    assert!(matches!(&unknown[..], [Outcome::Reply(Err(CommandError::NotFound(_)))]));
    control.execute(Command::Quit);
    assert_eq!(set(&mut control, "mem0", 0), "error: the VM has ended");
}
