//! The proxy under load: as many clients as it takes, a VMM that answers out of order, clients that come, go and talk
//! nonsense meanwhile. And what a command costs through it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::fake::{FakeVmm, PATIENCE, Peer};
use super::monitor::Monitor;
use super::proxy::Proxy;
use super::session::MAX_CLIENTS;

/// Numbers that look random and are the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// Answers in any order, says things in between, never loses a command.
async fn disorderly(mut vmm: Peer) {
    let mut dice = Dice(1);
    let mut waiting: Vec<Value> = Vec::new();
    loop {
        // With nothing to do, or with more to gain, listen; otherwise answer somebody.
        let request = if waiting.is_empty() {
            match vmm.next().await {
                Some(request) => Some(request),
                None => return,
            }
        } else {
            tokio::time::timeout(Duration::from_micros(dice.roll(300)), vmm.next()).await.ok().flatten()
        };
        waiting.extend(request);
        if !waiting.is_empty() && dice.roll(3) > 0 {
            let at = usize::try_from(dice.roll(waiting.len() as u64)).unwrap();
            let request = waiting.swap_remove(at);
            if dice.roll(4) == 0 {
                vmm.event("NOISE", json!({"n": dice.roll(1000)})).await;
            }
            vmm.answer(&request, request["arguments"].clone()).await;
        }
    }
}

/// Sends commands in every shape a client may, and checks that each answer is the answer.
async fn busy(mut client: Peer, seed: u64, rounds: u64) -> u64 {
    let mut dice = Dice(seed);
    let mut noise = 0;
    for round in 0..rounds {
        let batch = 1 + dice.roll(4);
        let mut text = String::new();
        for part in 0..batch {
            let command = json!({"execute": "x", "arguments": {"v": [seed, round, part]}, "id": {"n": [seed, round, part]}});
            text += &match dice.roll(3) {
                0 => command.to_string(),
                1 => format!("{command}\r\n"),
                _ => serde_json::to_string_pretty(&command).unwrap(),
            };
        }
        // In one write, or torn anywhere.
        let cut = usize::try_from(dice.roll(text.len() as u64)).unwrap();
        client.send(&text[..cut]).await;
        if dice.roll(2) == 0 {
            tokio::task::yield_now().await;
        }
        client.send(&text[cut..]).await;
        let mut part = 0;
        while part < batch {
            let message = client.message().await;
            if message["event"] == "NOISE" {
                noise += 1;
                continue;
            }
            let expected = json!([seed, round, part]);
            assert_eq!((&message["return"]["v"], &message["id"]["n"]), (&expected, &expected));
            part += 1;
        }
    }
    noise
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn sixteen_clients_at_once() {
    const STEADY: usize = MAX_CLIENTS - 4;
    let fake = FakeVmm::new();
    let path = fake.directory.path().join("web.sock");
    let proxy = Proxy::bind(&path, &Arc::default(), None, None).unwrap();
    let (monitor, vmm) = fake.monitor().await;
    proxy.set_monitor(Some(monitor));
    let vmm = tokio::spawn(disorderly(vmm));

    let mut steady = tokio::task::JoinSet::new();
    for seed in 1..=STEADY as u64 {
        let client = Peer::connect(&path).await.0;
        steady.spawn(busy(client, seed, 100));
    }
    // These come, say something sensible or not, and leave without a word.
    let mut fickle = tokio::task::JoinSet::new();
    for seed in 100..104 {
        let path = path.clone();
        fickle.spawn(async move {
            let mut dice = Dice(seed);
            for _ in 0..100 {
                let Ok(mut stream) = tokio::net::UnixStream::connect(&path).await else { continue };
                let text = match dice.roll(4) {
                    0 => "{\"execute\":\"x\",\"arguments\":{}}",
                    1 => "{\"execute\":",
                    2 => "{]]}nonsense\n{\"execute\":\"x\"}{\"execute\":\"y\"}",
                    _ => "",
                };
                // The proxy may be full for a moment and have hung up.
                let _ = stream.write_all(text.as_bytes()).await;
                tokio::task::yield_now().await;
            }
        });
    }
    let noise: u64 = steady.join_all().await.into_iter().sum();
    fickle.join_all().await;
    assert!(noise > 0);
    drop(proxy);
    tokio::time::timeout(PATIENCE, vmm).await.expect("the connection outlives the proxy").unwrap();
}

/// The middle of many round trips.
async fn median(client: &mut Peer) -> Duration {
    const ROUNDS: usize = 1000;
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        client.ask("{\"execute\":\"query-status\",\"id\":1}\r\n").await;
        times.push(begin.elapsed());
    }
    times.sort_unstable();
    times[ROUNDS / 2]
}

/// Prints, does not judge: the time is the machine's as much as ours. `cargo test -p supervisor cost -- --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cost_of_the_proxy() {
    let fake = FakeVmm::new();
    let path = fake.path();
    let (mut direct, ()) =
        tokio::join!(async { Peer::new(tokio::net::UnixStream::connect(&path).await.unwrap()) }, async {
            tokio::spawn(fake.accept().await.echo());
        });
    let straight = median(&mut direct).await;

    let monitor: Monitor = fake.echo().await;
    let begin = Instant::now();
    for _ in 0..1000 {
        monitor.execute("query-status", None, PATIENCE).await.unwrap();
    }
    let by_monitor = begin.elapsed() / 1000;

    let socket = fake.directory.path().join("web.sock");
    let proxy = Proxy::bind(&socket, &Arc::default(), None, None).unwrap();
    proxy.set_monitor(Some(monitor));
    let (mut client, _) = Peer::connect(&socket).await;
    let through = median(&mut client).await;
    println!(
        "one command: {straight:?} straight, {by_monitor:?} by the monitor, {through:?} through the proxy ({:?} more)",
        through.saturating_sub(straight)
    );
}
