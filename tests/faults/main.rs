//! Damaged and hostile files: each gives an error that names file and tensor or key; none panics.

mod adapters;
mod fixture;
mod models;
mod random;
mod saes;

use std::panic::{AssertUnwindSafe, catch_unwind};

use fixture::Fixture;
use resa_engine::Result;

/// One way to damage a valid folder, and what the error's text must contain.
struct Row {
    what: &'static str,
    damage: fn(&Fixture),
    says: &'static [&'static str],
}

/// Loads a fresh fixture after each damage; all rows are tried before the test fails.
fn check(rows: &[Row], load: fn(&Fixture) -> Result<()>) {
    let fixture = Fixture::new();
    load(&fixture).expect("the undamaged fixture must load");
    let failures: Vec<String> = rows
        .iter()
        .filter_map(|row| {
            let fixture = Fixture::new();
            (row.damage)(&fixture);
            match catch_unwind(AssertUnwindSafe(|| load(&fixture))) {
                Err(_) => Some(format!("{}: panicked", row.what)),
                Ok(Ok(())) => Some(format!("{}: loaded without an error", row.what)),
                Ok(Err(error)) => {
                    let text = error.to_string();
                    let missing = row.says.iter().find(|says| !text.contains(*says))?;
                    Some(format!("{}: no {missing:?} in: {text}", row.what))
                }
            }
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
