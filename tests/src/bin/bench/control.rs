//! What a QMP client waits for: a round trip, and the pause of a guest that is halted or spins.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use tests::qmp::Qmp;

use crate::Result;
use crate::process::Vm;
use crate::subject::{Command, Setting, Subject};

const LIMIT: Duration = Duration::from_secs(10);
/// Round trips for one sample, back to back, after as many that do not count.
const ROUND_TRIPS: u32 = 200;
/// Pauses for one sample.
const PAUSES: u32 = 10;
/// From the guest's first byte until it surely halts or spins.
const SETTLES: Duration = Duration::from_millis(200);

/// Averages of one VM each, in microseconds.
pub(crate) struct Control {
    /// `query-status`, back to back.
    pub(crate) round_trip: f64,
    /// `stop` of a guest that halted for good.
    pub(crate) halted: f64,
    /// `stop` of a guest that keeps its vCPU busy.
    pub(crate) spinning: f64,
}

/// Takes all three from two VMs, one after the other. `None` for a VMM without QMP.
pub(crate) fn measure(subject: &Subject, setting: &Setting) -> Result<Option<Control>> {
    if !subject.speaks_qmp() {
        return Ok(None);
    }
    let (vm, mut qmp) = start(subject, setting, Command::Hold)?;
    ask(&mut qmp, ROUND_TRIPS)?;
    let begin = Instant::now();
    ask(&mut qmp, ROUND_TRIPS)?;
    let round_trip = microseconds(begin.elapsed(), ROUND_TRIPS);
    let halted = pauses(&mut qmp)?;
    drop(vm);
    let (_vm, mut qmp) = start(subject, setting, Command::Spin)?;
    Ok(Some(Control { round_trip, halted, spinning: pauses(&mut qmp)? }))
}

fn start(subject: &Subject, setting: &Setting, command: Command) -> Result<(Vm, Qmp)> {
    let mut vm = Vm::start(subject, setting, 0, command, false)?;
    vm.wait_for_first_byte()?;
    std::thread::sleep(SETTLES);
    let stream = UnixStream::connect(subject.qmp_socket(setting, 0))?;
    Ok((vm, Qmp::new(stream, LIMIT)?))
}

fn ask(qmp: &mut Qmp, times: u32) -> Result<()> {
    for _ in 0..times {
        qmp.ask("query-status")?;
    }
    Ok(())
}

fn pauses(qmp: &mut Qmp) -> Result<f64> {
    let mut total = Duration::ZERO;
    for _ in 0..PAUSES {
        let begin = Instant::now();
        qmp.ask("stop")?;
        total += begin.elapsed();
        qmp.ask("cont")?;
        // The guest runs again before it is stopped again.
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(microseconds(total, PAUSES))
}

fn microseconds(total: Duration, times: u32) -> f64 {
    total.as_secs_f64() * 1e6 / f64::from(times)
}
