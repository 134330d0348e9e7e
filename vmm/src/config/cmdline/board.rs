//! `-machine`, `-accel`, `-cpu`, `-smp`, `-m`, `-global`: what the board is made of.

use super::props::{Props, size};
use super::{CmdlineError, Given};
use crate::config::{MEMORY_MAX, MEMORY_MIN, MachineConfig, MachineKind, MemoryConfig, Smp, VmConfig};

/// Reads the options of this file out of `given` into `config`.
pub(super) fn read(given: &mut Given, config: &mut VmConfig) -> Result<(), CmdlineError> {
    // The machine first: a line for another board is refused for that, not for the first device that belongs to it.
    if let Some(text) = given.one("-machine") {
        config.machine = machine(&text)?;
    }
    if let Some(text) = given.one("-accel") {
        accel("-accel", &text)?;
    }
    if let Some(text) = given.one("-cpu") {
        cpu(&text)?;
    }
    if let Some(text) = given.one("-smp") {
        config.smp = smp(&text)?;
    }
    if let Some(text) = given.one("-m") {
        config.memory.size = memory(&text)?;
    }
    for text in given.many("-global") {
        config.fast_unplug = global(&text)?.unwrap_or(config.fast_unplug);
    }
    let MemoryConfig { path, prealloc, .. } = &mut config.memory;
    *path = given.path("-mem-path")?;
    *prealloc = given.flag("-mem-prealloc");
    Ok(())
}

fn machine(text: &str) -> Result<MachineConfig, CmdlineError> {
    let mut props = Props::parse("-machine", text, Some("type"))?;
    let kind = match props.word("type")? {
        None => MachineKind::Microvm,
        Some(name) => match name.to_ascii_lowercase().as_str() {
            "microvm" => MachineKind::Microvm,
            "q35" => MachineKind::Q35,
            "none" => MachineKind::None,
            "virt" => return Err(props.unsupported("machine type virt (use microvm or q35)")),
            _ => return Err(props.bad(format!("unknown machine type '{name}': use microvm or q35"))),
        },
    };
    if let Some(name) = props.text("accel")? {
        accel("-machine accel", &name)?;
    }
    let dump_guest_core = props.boolean("dump-guest-core")?.unwrap_or(true);
    let mem_share = props.boolean("mem-share")?.unwrap_or(false);
    if props.boolean("usb")? == Some(true) {
        return Err(props.unsupported("usb=on"));
    }
    props.finish()?;
    Ok(MachineConfig { kind, dump_guest_core, mem_share })
}

/// A property of all devices of a driver; the one that there is.
fn global(text: &str) -> Result<Option<bool>, CmdlineError> {
    let mut props = Props::parse("-global", text, None)?;
    let fast = props.number("pcie-root-port.fast-unplug", 0..=1)?;
    props.finish()?;
    Ok(fast.map(|n| n == 1))
}

fn accel(option: &'static str, text: &str) -> Result<(), CmdlineError> {
    match text {
        "kvm" | "kvm:tcg" => Ok(()),
        "test" => Err(CmdlineError::Unsupported { option, what: "accelerator test".to_owned() }),
        other => {
            Err(CmdlineError::BadValue { option, message: format!("unknown accelerator '{other}': use kvm") })
        }
    }
}

fn cpu(text: &str) -> Result<(), CmdlineError> {
    let mut props = Props::parse("-cpu", text, None)?;
    // A bare `host` is a key without value here, because scripts also write `-cpu pmu=on`.
    props.flag("host")?;
    // Features of arm hosts: scripts pass them whatever the host is, and they change nothing on x86_64.
    for key in ["pmu", "sve", "kvm-steal-time"] {
        props.boolean(key)?;
    }
    props.finish().map_err(|e| match e {
        CmdlineError::UnknownKey { key, .. } if !text.contains(&format!("{key}=")) => {
            CmdlineError::BadValue { option: "-cpu", message: format!("unknown CPU model '{key}': use host") }
        }
        e => e,
    })
}

fn smp(text: &str) -> Result<Smp, CmdlineError> {
    let mut props = Props::parse("-smp", text, Some("cpus"))?;
    let max = u64::from(crate::config::MAX_CPUS);
    let count = |props: &mut Props, key| -> Result<Option<u8>, CmdlineError> {
        Ok(props.number(key, 1..=max)?.map(narrow))
    };
    let cpus = match props.word("cpus")? {
        None => 1,
        Some(text) => match super::props::number(&text) {
            Some(n) if (1..=max).contains(&n) => narrow(n),
            _ => return Err(props.bad(format!("'{text}' is not in 1..={max}: write a number of vCPUs"))),
        },
    };
    let max_cpus = count(&mut props, "maxcpus")?;
    let sockets = count(&mut props, "sockets")?;
    let dies = count(&mut props, "dies")?.unwrap_or(1);
    let clusters = count(&mut props, "clusters")?.unwrap_or(1);
    let cores = count(&mut props, "cores")?;
    let threads = count(&mut props, "threads")?.unwrap_or(1);
    let max_cpus = max_cpus.unwrap_or_else(|| {
        let product = [sockets.unwrap_or(1), dies, clusters, cores.unwrap_or(1), threads]
            .iter()
            .try_fold(1u8, |product, n| product.checked_mul(*n));
        // Cores fill what the other numbers leave open; a full topology may name more CPUs than `cpus`.
        if cores.is_some() { product.map_or(cpus, |p| p.max(cpus)) } else { cpus }
    });
    let sockets = sockets.unwrap_or(1);
    let others = u32::from(sockets) * u32::from(dies) * u32::from(clusters) * u32::from(threads);
    let cores = cores.unwrap_or_else(|| narrow(u64::from(u32::from(max_cpus) / others)));
    props.finish()?;
    Ok(Smp { cpus, max_cpus, sockets, dies, clusters, cores, threads })
}

/// For numbers that were checked to be at most 254.
fn narrow(n: u64) -> u8 {
    u8::try_from(n).unwrap_or(u8::MAX)
}

fn memory(text: &str) -> Result<u64, CmdlineError> {
    let mut props = Props::parse("-m", text, Some("size"))?;
    let bad_size = |props: &Props, text: &str| {
        props.bad(format!(
            "memory size '{text}' should be a whole number with K, M or G, in the range of [{MEMORY_MIN}, {MEMORY_MAX}] bytes"
        ))
    };
    let bytes = match props.word("size")? {
        None => VmConfig::default().memory.size,
        Some(text) => size(&text).ok_or_else(|| bad_size(&props, &text))?,
    };
    if let Some(text) = props.text("maxmem")? {
        // A limit for what may be added while the VM runs. No device of this version adds memory, so that every limit is kept.
        let max = size(&text).ok_or_else(|| bad_size(&props, &text))?;
        if max < bytes {
            return Err(props.bad(format!("maxmem={text} is less than the memory at boot")));
        }
    }
    props.finish()?;
    Ok(bytes)
}
