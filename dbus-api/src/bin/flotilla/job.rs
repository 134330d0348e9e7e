//! `flotilla job`: what is under way, and the ending of it.

use comfy_table::Cell;
use serde::Serialize;

use crate::args::job::{CancelArgs, JobVerb, ListArgs};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, plain};
use crate::power::report;

/// `flotilla job`.
pub(crate) async fn job(client: &Client, verb: JobVerb) -> Result<(), Failure> {
    match verb {
        JobVerb::List(args) => list(client, args).await,
        JobVerb::Cancel(args) => cancel(client, args).await,
    }
}

/// A row of the list, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Row {
    id: u32,
    #[serde(rename = "type")]
    kind: String,
    vm: String,
    phase: String,
    age_usec: u64,
}

async fn list(client: &Client, args: ListArgs) -> Result<(), Failure> {
    let rows = client.manager.list_jobs().await.map_err(|error| client.failed(error))?;
    let rows: Vec<Row> = rows
        .into_iter()
        .map(|(id, kind, vm, _, phase, _, age_usec, _)| Row { id, kind, vm, phase, age_usec })
        .collect();
    if args.json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        output::note("No jobs are under way.");
        return Ok(());
    }
    output::print(&list_text(&rows, output::coloured()))
}

fn list_text(rows: &[Row], coloured: bool) -> String {
    let cells = rows.iter().map(|row| {
        vec![
            Cell::new(row.id),
            Cell::new(plain(&row.kind)),
            Cell::new(plain(&row.vm)),
            Cell::new(plain(&row.phase)),
            Cell::new(format!("{}s", row.age_usec / 1_000_000)),
        ]
    });
    output::table(&["JOB", "TYPE", "VM", "PHASE", "AGE"], cells.collect(), coloured)
}

async fn cancel(client: &Client, args: CancelArgs) -> Result<(), Failure> {
    let mut failures = Vec::new();
    for id in args.ids {
        match client.manager.cancel_job(id).await {
            Ok(()) => output::print(&format!("job {id} is being cancelled\n"))?,
            Err(error) => failures.push(client.failed(error).about(&format!("job {id}"))),
        }
    }
    report(failures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_is_under_way() {
        let row = Row {
            id: 17,
            kind: "create".into(),
            vm: "web".into(),
            phase: "copying the image".into(),
            age_usec: 3_900_000,
        };
        let text = list_text(&[row], false);
        assert_eq!(
            text,
            "JOB  TYPE    VM   PHASE              AGE\n17   create  web  copying the image  3s\n"
        );
    }
}
