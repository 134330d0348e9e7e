//! The `flotilla` command: the first client of the API. Here: from the command line to a verb, and from its outcome to an exit status.
//!
//! Rooms, upper first: `run` uses `console`, `define` and `power`, `create` uses `define`, `template` and `job` use `power`; those, `inspect` and `logs` use `jobs` and `client`; all use `output`,
//! `failure` and `args`.

mod args;
mod client;
mod console;
mod create;
mod define;
mod device;
mod doctor;
mod edit;
mod failure;
mod generate;
mod inspect;
mod job;
mod jobs;
mod logs;
mod network;
mod output;
mod power;
mod run;
mod stream;
mod template;
mod top;
mod watch;

use clap::Parser;

use crate::args::{Cli, Verb};
use crate::client::Client;
use crate::failure::{Exit, Failure};

fn main() {
    let cli = Cli::parse();
    let status = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(carry_out(cli)),
        Err(error) => Err(Failure::new(Exit::Failed, format!("cannot start: {error}"))),
    };
    let status = status.unwrap_or_else(|failure| {
        output::note(&format!("flotilla: {failure}"));
        i32::from(failure.exit as u8)
    });
    // Not by returning: a thread may still sit in a read of the standard input.
    std::process::exit(status);
}

/// Does what was asked; gives the exit status.
async fn carry_out(cli: Cli) -> Result<i32, Failure> {
    // What is wrong with the user's own files is said whether or not a daemon runs.
    if let Verb::Generate(args) = &cli.verb {
        return generate::generate(args).map(|()| 0);
    }
    if let Verb::Define(args) = cli.verb {
        let prepared = define::prepare(args)?;
        return define::define(&Client::connect(&cli.bus).await?, prepared).await.map(|()| 0);
    }
    if let Verb::Doctor(args) = &cli.verb {
        return doctor::doctor(&cli.bus, args).await.map(|()| 0);
    }
    let client = Client::connect(&cli.bus).await?;
    let done = match cli.verb {
        Verb::Run(args) => return run::run(&client, args).await,
        Verb::Console(args) => return console::console(&client, args).await,
        Verb::Create(args) => create::create(&client, args).await,
        Verb::Edit(args) => edit::edit(&client, args).await,
        Verb::Start(args) => power::start(&client, args).await,
        Verb::Stop(args) => power::stop(&client, args).await,
        Verb::Pause(args) => power::pause(&client, args).await,
        Verb::Resume(args) => power::resume(&client, args).await,
        Verb::List(args) => inspect::list(&client, args).await,
        Verb::Show(args) => inspect::show(&client, args).await,
        Verb::Rm(args) => power::rm(&client, args).await,
        Verb::Logs(args) => logs::logs(&client, args).await,
        Verb::Qmp(args) => inspect::qmp(&client, args).await,
        Verb::Network(verb) => network::network(&client, verb).await,
        Verb::Nic(verb) => device::nic(&client, verb).await,
        Verb::Disk(verb) => device::disk(&client, verb).await,
        Verb::Job(verb) => job::job(&client, verb).await,
        Verb::Template(verb) => template::template(&client, verb).await,
        Verb::Clone(args) => template::clone(&client, args).await,
        Verb::Events(args) => watch::events(&client, args).await,
        Verb::Wait(args) => watch::wait(&client, args).await,
        Verb::Top(args) => top::top(&client, args).await,
        Verb::Drain(args) => power::drain(&client, args).await,
        Verb::Undrain => power::undrain(&client).await,
        Verb::Define(_) | Verb::Generate(_) | Verb::Doctor(_) => Ok(()),
    };
    done.map(|()| 0)
}
