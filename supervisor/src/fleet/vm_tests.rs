//! Tests of the state machine: the usual lives as a script, and any order of inputs against the laws of the house.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const SHUTDOWN: Verb = Verb::Shutdown { force: true, timeout: Duration::from_secs(30) };
const ASK_ONLY: Verb = Verb::Shutdown { force: false, timeout: Duration::from_secs(30) };

fn ask(vm: &mut Vm, job: u32, verb: Verb) -> Vec<Effect> {
    vm.step(Input::Request { job, verb })
}

fn running() -> Vm {
    let mut vm = Vm::idle(State::Defined, "");
    ask(&mut vm, 1, Verb::Start { paused: false });
    let run = vm.run();
    vm.step(Input::Launched { run });
    vm.step(Input::Connected { run, paused: false });
    vm
}

fn ended(effects: &[Effect]) -> Vec<(u32, Option<FleetError>)> {
    let closed = |effect: &Effect| match effect {
        Effect::EndJob { job, result } => Some((*job, result.clone().err())),
        _ => None,
    };
    effects.iter().filter_map(closed).collect()
}

#[test]
fn a_start_ends_when_the_vmm_answers() {
    let mut vm = Vm::idle(State::Defined, "");
    let effects = ask(&mut vm, 7, Verb::Start { paused: true });
    assert!(matches!(effects[..], [Effect::Record, Effect::Arm(_), Effect::Launch { paused: true }]));
    assert_eq!((vm.state(), vm.intent()), (State::Starting, Intent::Paused));
    assert!(matches!(vm.step(Input::Launched { run: 1 })[..], [Effect::Record, Effect::Connect]));
    assert_eq!(ended(&vm.step(Input::Connected { run: 1, paused: true })), [(7, None)]);
    assert_eq!(vm.state(), State::Paused);
}

#[test]
fn a_shutdown_without_a_power_button_quits_or_says_so() {
    let refused = || Err(FleetError::NotSupported("no power button".to_owned()));
    let mut vm = running();
    assert!(matches!(
        ask(&mut vm, 2, SHUTDOWN)[..],
        [Effect::Record, Effect::Send(Command::Powerdown), Effect::Arm(_)]
    ));
    let effects = vm.step(Input::CommandDone { run: 1, command: Command::Powerdown, result: refused() });
    assert!(matches!(effects[..], [Effect::Record, Effect::Send(Command::Quit), Effect::Arm(_)]));
    assert_eq!(ended(&vm.step(Input::Gone { run: 1, exit: Exit::Code(0) })), [(2, None)]);
    assert_eq!((vm.state(), vm.intent()), (State::Stopped, Intent::Stopped));

    let mut vm = running();
    ask(&mut vm, 2, ASK_ONLY);
    let effects = vm.step(Input::CommandDone { run: 1, command: Command::Powerdown, result: refused() });
    assert_eq!(ended(&effects), [(2, refused().err())]);
    assert_eq!((vm.state(), vm.intent()), (State::Running, Intent::Running));
}

#[test]
fn a_power_off_overtakes_a_hanging_job_and_kills_what_does_not_quit() {
    let mut vm = running();
    ask(&mut vm, 2, Verb::Pause);
    let effects = ask(&mut vm, 3, Verb::PowerOff);
    assert!(matches!(ended(&effects)[..], [(2, Some(FleetError::Cancelled(_)))]));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Send(Command::Quit))));
    assert!(vm.step(Input::Deadline).iter().any(|effect| matches!(effect, Effect::Kill)));
    assert_eq!(ended(&vm.step(Input::Gone { run: 1, exit: Exit::Signal("SIGKILL".into()) })), [(3, None)]);
    assert_eq!(vm.state(), State::Stopped);
}

#[test]
fn a_power_off_before_there_is_a_process_kills_it_when_it_comes() {
    let mut vm = Vm::idle(State::Defined, "");
    ask(&mut vm, 1, Verb::Start { paused: false });
    let effects = ask(&mut vm, 2, Verb::PowerOff);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Kill)));
    assert!(vm.step(Input::Launched { run: 1 }).iter().any(|effect| matches!(effect, Effect::Kill)));
}

#[test]
fn a_unit_that_is_stopped_asks_the_guest_and_then_insists() {
    let asks = Input::UnitStops { run: 1, patience: Some(Duration::from_secs(30)) };
    let pressed =
        |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Send(Command::Powerdown)));
    let quits =
        |effects: &[Effect]| effects.iter().any(|effect| matches!(effect, Effect::Send(Command::Quit)));
    // In whichever order systemd's word and that of the unit's own process come.
    for first in [None, Some(Input::StopSeen { run: 1 })] {
        let mut vm = running();
        first.into_iter().for_each(|input| drop(vm.step(input)));
        assert!(pressed(&vm.step(asks.clone())));
        vm.step(Input::StopSeen { run: 1 });
        assert_eq!((vm.state(), vm.intent()), (State::Stopping, Intent::Stopped));
        assert!(quits(&vm.step(Input::Deadline)));
        // Asked again, by a daemon's next life: what was ordered stays ordered.
        assert!(vm.step(asks.clone()).is_empty());
        vm.step(Input::Gone { run: 1, exit: Exit::Code(0) });
        assert_eq!(vm.state(), State::Stopped);
    }
    // One that stands still cannot hear, and one that is not to be asked is not.
    let mut vm = running();
    vm.step(Input::VcpusChanged { run: 1, paused: true });
    vm.step(Input::StopSeen { run: 1 });
    assert!(quits(&vm.step(asks)));
    assert!(quits(&running().step(Input::UnitStops { run: 1, patience: None })));
}

#[test]
fn how_a_process_ends_decides_the_state() {
    let cases: [(&[Input], Exit, State, Intent); 5] = [
        (&[], Exit::Signal("SIGSEGV".into()), State::Failed, Intent::Running),
        (&[], Exit::Code(1), State::Failed, Intent::Running),
        (&[], Exit::Code(0), State::Stopped, Intent::Stopped),
        (
            &[Input::ShutdownSeen { run: 1, why: "the guest powered off".into(), guest: true }],
            Exit::Code(0),
            State::Stopped,
            Intent::Stopped,
        ),
        (&[Input::StopSeen { run: 1 }], Exit::Signal("SIGTERM".into()), State::Stopped, Intent::Stopped),
    ];
    for (before, exit, state, intent) in cases {
        let mut vm = running();
        for input in before {
            vm.step(input.clone());
        }
        vm.step(Input::Gone { run: 1, exit: exit.clone() });
        assert_eq!((vm.state(), vm.intent()), (state, intent), "{before:?} {exit:?}");
    }
}

#[test]
fn a_client_of_the_socket_is_an_administrator_too() {
    let client = |vm: &mut Vm, command, stage| vm.step(Input::Client { run: 1, command, stage });
    // `quit`, and the VMM ends without a word.
    let mut vm = running();
    client(&mut vm, Command::Quit, Sent::Asked);
    assert_eq!(vm.state(), State::Running, "told, not done");
    vm.step(Input::Gone { run: 1, exit: Exit::Signal("SIGKILL".into()) });
    assert_eq!((vm.state(), vm.intent()), (State::Stopped, Intent::Stopped));
    // The VMM refused: what comes later is a crash.
    let mut vm = running();
    client(&mut vm, Command::Quit, Sent::Asked);
    client(&mut vm, Command::Quit, Sent::Refused);
    vm.step(Input::Gone { run: 1, exit: Exit::Signal("SIGSEGV".into()) });
    assert_eq!(vm.state(), State::Failed);
    // What the vCPUs do is wanted, whichever comes first, event or answer.
    let mut vm = running();
    vm.step(Input::VcpusChanged { run: 1, paused: true });
    assert_eq!((vm.state(), vm.intent()), (State::Paused, Intent::Running));
    client(&mut vm, Command::Stop, Sent::Done);
    assert_eq!((vm.state(), vm.intent()), (State::Paused, Intent::Paused));
    client(&mut vm, Command::Cont, Sent::Refused);
    assert_eq!((vm.state(), vm.intent()), (State::Paused, Intent::Paused));
    client(&mut vm, Command::Cont, Sent::Done);
    assert_eq!((vm.state(), vm.intent()), (State::Running, Intent::Running));
    // Of another process: nothing.
    vm.step(Input::Client { run: 9, command: Command::Stop, stage: Sent::Done });
    assert_eq!(vm.state(), State::Running);
}

#[test]
fn what_ends_by_itself_starts_again_if_its_policy_says_so() {
    let crash = || Exit::Signal("SIGSEGV".to_owned());
    let off = |guest| Input::ShutdownSeen { run: 1, why: "end".into(), guest };
    let button = Input::Client { run: 1, command: Command::Powerdown, stage: Sent::Done };
    let quit = Input::Client { run: 1, command: Command::Quit, stage: Sent::Asked };
    let power_off = Input::Request { job: 2, verb: Verb::PowerOff };
    let cases: [(&[Input], Exit, [bool; 3]); 9] = [
        (&[], crash(), [false, true, true]),
        (&[], Exit::Code(1), [false, true, true]),
        (&[off(true)], Exit::Code(0), [false, false, true]),
        (&[], Exit::Code(0), [false, false, true]),
        // Somebody wanted it.
        (&[off(false)], Exit::Code(0), [false; 3]),
        (&[button, off(true)], Exit::Code(0), [false; 3]),
        (&[quit, off(true)], crash(), [false; 3]),
        (&[Input::StopSeen { run: 1 }], crash(), [false; 3]),
        (&[power_off], crash(), [false; 3]),
    ];
    for (before, exit, again) in cases {
        for (policy, again) in [Restart::Never, Restart::OnFailure, Restart::Always].into_iter().zip(again) {
            let mut vm = running();
            vm.set_policy(policy);
            for input in before {
                vm.step(input.clone());
            }
            let effects = vm.step(Input::Gone { run: 1, exit: exit.clone() });
            let pause =
                effects.iter().find_map(|e| if let Effect::RestartIn(p) = e { Some(*p) } else { None });
            assert_eq!(pause, again.then_some(Duration::from_secs(1)), "{policy:?} {before:?} {exit:?}");
            assert_eq!(vm.restart_due(), pause);
            assert!(!again || vm.intent() == Intent::Running);
        }
    }
}

#[test]
fn restarts_back_off_and_end() {
    let mut vm = running();
    vm.set_policy(Restart::OnFailure);
    let mut pauses = Vec::new();
    loop {
        let run = vm.run();
        vm.step(Input::Gone { run, exit: Exit::Code(1) });
        let Some(pause) = vm.restart_due() else { break };
        pauses.push(pause.as_secs());
        let effects = vm.step(Input::RestartDue { run });
        assert!(matches!(effects.last(), Some(Effect::Launch { paused: false })), "{effects:?}");
        // The first of them does not even come to be; that counts as well.
        let run = vm.run();
        if pauses.len() == 1 {
            let error = FleetError::LaunchFailed("no".into());
            vm.step(Input::LaunchFailed { run, error });
            pauses.push(vm.restart_due().unwrap().as_secs());
            vm.step(Input::RestartDue { run });
        }
        let run = vm.run();
        vm.step(Input::Launched { run });
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
    assert!(vm.state() == State::Failed && vm.reason().contains("not started again"), "{}", vm.reason());
    // A long good life forgives.
    ask(&mut vm, 1, Verb::Start { paused: false });
    vm.settle();
    let run = vm.run();
    vm.step(Input::Launched { run });
    vm.step(Input::Connected { run, paused: false });
    vm.step(Input::Gone { run, exit: Exit::Code(1) });
    assert_eq!(vm.restart_due(), Some(Duration::from_secs(1)));
}

#[test]
fn before_a_restart_an_administrator_goes_first() {
    let waiting = || {
        let mut vm = running();
        vm.set_policy(Restart::Always);
        vm.step(Input::Gone { run: 1, exit: Exit::Code(1) });
        assert_eq!(vm.state(), State::Failed);
        vm
    };
    for verb in [SHUTDOWN, Verb::PowerOff] {
        let mut vm = waiting();
        assert_eq!(ended(&ask(&mut vm, 9, verb)), [(9, None)]);
        assert_eq!((vm.state(), vm.intent()), (State::Stopped, Intent::Stopped));
        assert!(vm.step(Input::RestartDue { run: 1 }).is_empty());
    }
    let mut vm = waiting();
    ask(&mut vm, 9, Verb::Start { paused: false });
    assert!(vm.step(Input::RestartDue { run: 1 }).is_empty());
    assert!(waiting().admit_undefine().is_ok());
    // A start that was asked for and failed has told so: nothing goes on behind the administrator's back.
    let mut vm = Vm::idle(State::Defined, "");
    vm.set_policy(Restart::Always);
    ask(&mut vm, 1, Verb::Start { paused: false });
    vm.step(Input::LaunchFailed { run: 1, error: FleetError::LaunchFailed("no".into()) });
    assert_eq!(vm.restart_due(), None);
}

#[test]
fn silence_is_quarantine_and_an_answer_ends_it() {
    let mut vm = running();
    vm.step(Input::Disconnected { run: 1 });
    vm.step(Input::Silent { run: 1 });
    assert_eq!(vm.state(), State::Quarantined);
    assert!(matches!(vm.admit(Verb::Pause), Err(FleetError::InvalidState(_))));
    assert!(vm.admit(Verb::PowerOff).is_ok());
    vm.step(Input::Connected { run: 1, paused: false });
    assert_eq!(vm.state(), State::Running);
}

#[test]
fn found_processes_go_on_as_they_were() {
    for (state, forced, now) in [
        (State::Running, false, State::Running),
        (State::Quarantined, false, State::Quarantined),
        (State::Stopping, true, State::Stopping),
        (State::Stopping, false, State::Starting),
        (State::Stopped, false, State::Starting),
    ] {
        assert_eq!(Vm::found(state, Intent::Running, forced).state(), now);
    }
    let mut vm = Vm::found(State::Stopping, Intent::Stopped, true);
    let effects = vm.step(Input::Connected { run: 1, paused: false });
    assert!(matches!(effects[..], [Effect::Send(Command::Quit), Effect::Arm(_)]));
}

#[test]
fn what_does_not_run_cannot_be_stopped_and_says_what_it_is() {
    for (state, verb, says) in [
        (State::Stopped, SHUTDOWN, "it is stopped already"),
        (State::Stopped, Verb::PowerOff, "it is stopped already"),
        (State::Defined, SHUTDOWN, "it is defined: there is nothing to stop"),
        (State::Failed, Verb::PowerOff, "it is failed: there is nothing to stop"),
        (State::Stopped, Verb::Pause, "it is stopped: start it first"),
    ] {
        let refused = Vm::idle(state, "").admit(verb);
        assert_eq!(refused, Err(FleetError::InvalidState(says.to_owned())));
    }
}

fn any_verb() -> impl Strategy<Value = Verb> {
    prop_oneof![
        any::<bool>().prop_map(|paused| Verb::Start { paused }),
        any::<bool>().prop_map(|force| Verb::Shutdown { force, timeout: Duration::from_secs(1) }),
        Just(Verb::PowerOff),
        Just(Verb::Pause),
        Just(Verb::Resume),
    ]
}

/// An input whose process number is the current one, or one that is gone.
fn any_input() -> impl Strategy<Value = (bool, Input)> {
    let error = || FleetError::QmpError("no".to_owned());
    let commands = [Command::Powerdown, Command::Quit, Command::Stop, Command::Cont];
    let command = prop::sample::select(commands.to_vec());
    let sent = prop_oneof![Just(Sent::Asked), Just(Sent::Done), Just(Sent::Refused), Just(Sent::Left)];
    let client_command = command.clone();
    let exit = prop_oneof![Just(Exit::Code(0)), Just(Exit::Unknown), Just(Exit::Signal("SIGKILL".into()))];
    let run = 0;
    let input = prop_oneof![
        4 => any_verb().prop_map(|verb| Input::Request { job: 0, verb }),
        1 => Just(Input::Cancel { job: 0 }),
        1 => Just(Input::StartSeen),
        2 => Just(Input::Launched { run }),
        1 => Just(Input::LaunchFailed { run, error: error() }),
        2 => any::<bool>().prop_map(move |paused| Input::Connected { run, paused }),
        1 => Just(Input::Silent { run }),
        1 => Just(Input::Disconnected { run }),
        1 => any::<bool>().prop_map(move |paused| Input::VcpusChanged { run, paused }),
        1 => any::<bool>().prop_map(move |guest| Input::ShutdownSeen { run, why: "end".into(), guest }),
        2 => Just(Input::RestartDue { run }),
        1 => Just(Input::StopSeen { run }),
        1 => any::<bool>().prop_map(move |asks| Input::UnitStops {
            run,
            patience: asks.then_some(Duration::from_secs(30)),
        }),
        2 => (command, any::<bool>()).prop_map(move |(command, ok)| {
            let result = if ok { Ok(()) } else { Err(error()) };
            Input::CommandDone { run, command, result }
        }),
        2 => (client_command, sent).prop_map(move |(command, stage)| Input::Client { run, command, stage }),
        2 => exit.prop_map(move |exit| Input::Gone { run, exit }),
        1 => Just(Input::Deadline),
    ];
    (prop::bool::weighted(0.9), input)
}

fn with_run(input: Input, now: u64) -> Input {
    match input {
        Input::Launched { .. } => Input::Launched { run: now },
        Input::LaunchFailed { error, .. } => Input::LaunchFailed { run: now, error },
        Input::Connected { paused, .. } => Input::Connected { run: now, paused },
        Input::Silent { .. } => Input::Silent { run: now },
        Input::Disconnected { .. } => Input::Disconnected { run: now },
        Input::VcpusChanged { paused, .. } => Input::VcpusChanged { run: now, paused },
        Input::ShutdownSeen { why, guest, .. } => Input::ShutdownSeen { run: now, why, guest },
        Input::RestartDue { .. } => Input::RestartDue { run: now },
        Input::StopSeen { .. } => Input::StopSeen { run: now },
        Input::UnitStops { patience, .. } => Input::UnitStops { run: now, patience },
        Input::CommandDone { command, result, .. } => Input::CommandDone { run: now, command, result },
        Input::Client { command, stage, .. } => Input::Client { run: now, command, stage },
        Input::Gone { exit, .. } => Input::Gone { run: now, exit },
        other => other,
    }
}

proptest! {
    #[test]
    fn the_laws_hold_in_any_order(
        inputs in prop::collection::vec(any_input(), 0..80),
        policy in prop::sample::select(vec![Restart::Never, Restart::OnFailure, Restart::Always]),
    ) {
        let mut vm = Vm::idle(State::Defined, "");
        vm.set_policy(policy);
        // An administrator asked for an end, and for no start since.
        let mut told_to_end = false;
        // A process may exist from Launch (or a start seen) until it is gone.
        let mut process = false;
        let mut open: BTreeMap<u32, ()> = BTreeMap::new();
        let mut next_job = 0;
        let last = [(true, Input::Gone { run: 0, exit: Exit::Code(0) })];
        for (current, input) in inputs.into_iter().chain(last) {
            let input = match input {
                Input::Request { verb, .. } => {
                    next_job += 1;
                    open.insert(next_job, ());
                    Input::Request { job: next_job, verb }
                }
                // That of the job under way, or of none that there is.
                Input::Cancel { .. } => {
                    Input::Cancel { job: vm.job().filter(|_| current).unwrap_or(u32::MAX) }
                }
                other => with_run(other, if current { vm.run() } else { vm.run().wrapping_sub(1) }),
            };
            let before = vm.clone();
            let effects = vm.step(input.clone());
            let ends = matches!(input, Input::Gone { .. } | Input::LaunchFailed { .. });
            if ends && current {
                process = false;
            }
            if matches!(input, Input::StartSeen) && before.state().idle() {
                process = true;
            }
            for effect in &effects {
                match effect {
                    Effect::Launch { .. } => {
                        prop_assert!(!process, "two processes");
                        let asked = matches!(input, Input::Request { verb: Verb::Start { .. }, .. });
                        let due = matches!(input, Input::RestartDue { .. }) && before.restart_due().is_some();
                        prop_assert!(asked || due, "started by itself");
                        prop_assert!(policy != Restart::Never || asked, "restarted against its policy");
                        prop_assert!(asked || !told_to_end, "restarted against an administrator's stop");
                        process = true;
                    }
                    Effect::EndJob { job, .. } => {
                        prop_assert!(open.remove(job).is_some(), "a job ended twice");
                    }
                    _ => {}
                }
            }
            match &input {
                // Admitted, not refused: a refused one changes nothing.
                Input::Request { verb: Verb::Start { .. }, .. } if before.state().idle() && before.job().is_none() => {
                    told_to_end = false;
                }
                Input::Request { verb: Verb::PowerOff, .. } if before.admit(Verb::PowerOff).is_ok() => told_to_end = true,
                Input::Cancel { job } if before.state() == State::Starting && before.admit_cancel(*job).is_ok() => {
                    told_to_end = true;
                }
                Input::StopSeen { run } | Input::UnitStops { run, .. }
                    if *run == before.run() && !before.state().idle() => told_to_end = true,
                Input::StartSeen if before.state().idle() => told_to_end = false,
                _ => {}
            }
            prop_assert!(vm.row() <= MOST);
            prop_assert!(vm.restart_due().is_none() || (vm.state().idle() && policy != Restart::Never));
            prop_assert_eq!(vm.state().idle(), !process, "{:?} -> {:?} by {:?}", before.state(), vm.state(), input);
            prop_assert_eq!(vm.job(), open.keys().next().copied(), "a job is lost");
            prop_assert!(open.len() <= 1);
            // An administrator's stop stands until somebody asks for something else.
            if before.intent() == Intent::Stopped && vm.intent() != Intent::Stopped {
                // `stop` and `cont` from the QMP socket are asked for too: the VM that announced its end may live and answer again.
                let asked = matches!(
                    input,
                    Input::Request { .. }
                        | Input::Cancel { .. }
                        | Input::StartSeen
                        | Input::CommandDone { .. }
                        | Input::Deadline
                        | Input::Client { command: Command::Stop | Command::Cont, stage: Sent::Done | Sent::Left, .. }
                );
                prop_assert!(asked, "intent changed by {:?}", input);
                told_to_end = false;
            }
        }
        prop_assert!(open.is_empty(), "a job outlived its process");
    }
}
