//! Medians, spreads, ratios to the floor, as a table or JSON.

use std::fmt;
use std::fs;

use serde_json::{Value, json};

use crate::Result;
use crate::control::Control;
use crate::fleet::Fleet;
use crate::load::{LINES, Rates};
use crate::process::Single;
use crate::saved::Saved;
use crate::subject::{Setting, Subject};
use crate::syscalls;

/// All samples of one subject.
pub(crate) struct Results {
    name: String,
    /// Why it is not measured, or no longer.
    pub(crate) failure: Option<String>,
    wall: Vec<f64>,
    cpu: Vec<f64>,
    alone: Vec<f64>,
    threads: Vec<f64>,
    calls: Vec<f64>,
    file: Vec<f64>,
    mapped: Vec<f64>,
    rate: Vec<f64>,
    each: Vec<f64>,
    round_trip: Vec<f64>,
    halted: Vec<f64>,
    spinning: Vec<f64>,
    loads: [Vec<f64>; LINES.len()],
    save: [Vec<f64>; 2],
    size: [Vec<f64>; 2],
    restore: [Vec<f64>; 2],
    touch: Vec<f64>,
    clone_rate: Vec<f64>,
    clone_each: Vec<f64>,
}

/// Everything, ready to print.
pub(crate) struct Report {
    /// The floor first.
    pub(crate) results: Vec<Results>,
    /// Guest RAM, MiB.
    pub(crate) memory: usize,
    /// VMs at once.
    pub(crate) fleet: usize,
}

impl Results {
    /// None yet.
    pub(crate) fn new(subject: &Subject) -> Self {
        let (name, failure) = (subject.name.clone(), None);
        let [wall, cpu, alone, threads, calls, file, mapped, rate, each] = [const { Vec::new() }; 9];
        let [round_trip, halted, spinning] = [const { Vec::new() }; 3];
        Self {
            name,
            failure,
            wall,
            cpu,
            alone,
            threads,
            calls,
            file,
            mapped,
            rate,
            each,
            round_trip,
            halted,
            spinning,
            loads: [const { Vec::new() }; LINES.len()],
            save: Default::default(),
            size: Default::default(),
            restore: Default::default(),
            touch: Vec::new(),
            clone_rate: Vec::new(),
            clone_each: Vec::new(),
        }
    }

    /// Takes what does not change from run to run.
    pub(crate) fn describe(&mut self, subject: &Subject, setting: &Setting) -> Result<()> {
        self.file.push(fs::metadata(&subject.program)?.len() as f64 / 1024.0);
        self.calls.push(syscalls::count(subject, setting)? as f64);
        Ok(())
    }

    /// Adds a single start, or its failure.
    pub(crate) fn add_single(&mut self, sample: Result<Single>) {
        match sample {
            Ok(single) => {
                self.wall.push(single.wall * 1e3);
                self.cpu.push(single.cpu * 1e3);
                self.alone.push(single.maps.private as f64);
                self.mapped.push(single.maps.code as f64);
                self.threads.push(single.threads as f64);
            }
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Adds a fleet, or its failure.
    pub(crate) fn add_fleet(&mut self, sample: Result<Fleet>) {
        match sample {
            Ok(fleet) => {
                self.rate.push(fleet.per_second);
                self.each.push(fleet.private_each);
            }
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Adds round trips and pauses, or their failure.
    pub(crate) fn add_control(&mut self, sample: Result<Option<Control>>) {
        match sample {
            Ok(Some(control)) => {
                self.round_trip.push(control.round_trip);
                self.halted.push(control.halted);
                self.spinning.push(control.spinning);
            }
            Ok(None) => {}
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Adds what disk and network carried, or the failure.
    pub(crate) fn add_load(&mut self, sample: Result<Rates>) {
        match sample {
            Ok(rates) => self.loads.iter_mut().zip(rates).for_each(|(to, rate)| to.extend(rate)),
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Adds a snapshot and a start from it, or their failure.
    pub(crate) fn add_saved(&mut self, sample: Result<Option<Saved>>) {
        match sample {
            Ok(Some(saved)) => {
                for i in 0..2 {
                    self.save[i].push(saved.save[i] * 1e3);
                    self.size[i].push(saved.size[i]);
                    self.restore[i].push(saved.restore[i] * 1e3);
                }
                self.touch.push(saved.touch);
            }
            Ok(None) => {}
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    /// Adds clones, or their failure.
    pub(crate) fn add_clones(&mut self, sample: Result<Option<Fleet>>) {
        match sample {
            Ok(Some(fleet)) => {
                self.clone_rate.push(fleet.per_second);
                self.clone_each.push(fleet.private_each);
            }
            Ok(None) => {}
            Err(error) => self.failure = Some(error.to_string()),
        }
    }

    fn metrics(&self) -> Vec<(&'static str, &'static str, &[f64])> {
        let mut all: Vec<(_, _, &[f64])> = vec![
            ("exec to first guest byte, wall", "ms", &self.wall),
            ("exec to first guest byte, CPU", "ms", &self.cpu),
            ("private memory beyond guest RAM, alone", "KiB", &self.alone),
            ("threads", "", &self.threads),
            ("system calls to first guest byte", "", &self.calls),
            ("binary file", "KiB", &self.file),
            ("binary and libraries mapped", "KiB", &self.mapped),
            ("starts per second, all kept", "/s", &self.rate),
            ("private memory each, among all", "KiB", &self.each),
            ("QMP round trip, back to back", "us", &self.round_trip),
            ("QMP stop of a halted guest", "us", &self.halted),
            ("QMP stop of a spinning guest", "us", &self.spinning),
        ];
        all.extend([
            ("snapshot of 1 GiB, 64 MiB used", "ms", &self.save[0][..]),
            ("snapshot of 1 GiB, 900 MiB used", "ms", &self.save[1]),
            ("on disk, 64 MiB used", "MiB", &self.size[0]),
            ("on disk, 900 MiB used", "MiB", &self.size[1]),
            ("exec to first byte of a restored guest, 64 MiB used", "ms", &self.restore[0]),
            ("exec to first byte of a restored guest, 900 MiB used", "ms", &self.restore[1]),
            ("first write to a page after that", "us", &self.touch),
            ("clones per second, all kept", "/s", &self.clone_rate),
            ("private memory of each clone", "KiB", &self.clone_each),
        ]);
        all.extend(LINES.iter().zip(&self.loads).map(|(line, samples)| (line.name, line.unit, &samples[..])));
        all
    }
}

/// Value at `share` of the sorted samples; NaN of none.
fn quantile(samples: &[f64], share: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n => sorted[((n - 1) as f64 * share).round() as usize],
    }
}

/// Median of the ratios round by round: what disturbs a round disturbs both. Other than that, the ratio of the medians.
fn ratio(samples: &[f64], floor: &[f64]) -> f64 {
    if samples.len() == floor.len() {
        let ratios: Vec<f64> = samples.iter().zip(floor).map(|(s, f)| s / f).collect();
        return quantile(&ratios, 0.5);
    }
    quantile(samples, 0.5) / quantile(floor, 0.5)
}

fn machine() -> (String, String, usize) {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo")
        .lines()
        .find_map(|l| Some(l.strip_prefix("model name")?.split_once(": ")?.1.to_owned()));
    let load = read("/proc/loadavg").split(' ').take(3).collect::<Vec<_>>().join(" ");
    (cpu.unwrap_or_default(), load, std::thread::available_parallelism().map_or(0, usize::from))
}

impl Report {
    /// What each metric's ratios refer to: the floor, or the first subject where it has no such thing.
    fn bases(&self) -> Vec<&[f64]> {
        (0..self.results[0].metrics().len())
            .map(|i| {
                self.results.iter().map(|r| r.metrics()[i].2).find(|s| !s.is_empty()).unwrap_or_default()
            })
            .collect()
    }

    /// The same as the table, for programs.
    pub(crate) fn json(&self) -> Value {
        let (cpu, load, processors) = machine();
        let subjects: Vec<Value> = self
            .results
            .iter()
            .map(|results| {
                let metrics: Vec<Value> = results
                    .metrics()
                    .iter()
                    .zip(self.bases())
                    .filter(|((_, _, samples), _)| !samples.is_empty())
                    .map(|((name, unit, samples), base)| {
                        json!({
                            "metric": name, "unit": unit, "median": quantile(samples, 0.5), "p10": quantile(samples, 0.1),
                            "p90": quantile(samples, 0.9), "samples": samples.len(), "ratio": ratio(samples, base),
                        })
                    })
                    .collect();
                json!({ "name": results.name, "failure": results.failure, "metrics": metrics })
            })
            .collect();
        json!({
            "cpu": cpu, "processors": processors, "load": load, "guest_mib": self.memory, "fleet": self.fleet,
            "subjects": subjects,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cpu, load, processors) = machine();
        writeln!(f, "{processors} x {cpu}; load {load}; guest {} MiB, fleet {}", self.memory, self.fleet)?;
        writeln!(
            f,
            "median (p10 to p90), ratio to the first line; on a loaded machine only the ratios mean something"
        )?;
        let metrics = self.results[0].metrics();
        for (i, ((name, unit, _), base)) in metrics.iter().zip(self.bases()).enumerate() {
            if self.results.iter().all(|r| r.metrics()[i].2.is_empty()) {
                continue;
            }
            writeln!(f, "\n{name}")?;
            for results in &self.results {
                let samples = results.metrics()[i].2;
                if samples.is_empty() {
                    continue;
                }
                let [low, median, high] = [0.1, 0.5, 0.9].map(|share| quantile(samples, share));
                let spread =
                    if samples.len() > 1 { format!("({low:.1} to {high:.1})") } else { String::new() };
                let own = ratio(samples, base);
                writeln!(f, "  {:<20} {median:>9.1} {unit:<4} {spread:<22} {own:>6.2}x", results.name)?;
            }
        }
        for results in &self.results {
            if let Some(failure) = &results.failure {
                writeln!(f, "\n{}: {failure}", results.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_ratios() {
        let samples = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 1.0].map(|s| quantile(&samples, s)), [1.0, 3.0, 5.0]);
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!(ratio(&[2.0, 40.0, 6.0], &[1.0, 10.0, 3.0]), 2.0);
        assert_eq!(ratio(&[6.0], &[1.0, 3.0, 9.0]), 2.0);
    }
}
