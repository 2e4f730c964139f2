//! Ctrl-C: the first asks the run to stop after a checkpoint, the second ends the program.

use resa_engine::train::CancelFlag;

use super::output;

/// The exit code of an interrupted program.
pub const EXIT_CODE: u8 = 130;

/// A flag that the first interruption sets.
pub fn cancel_flag() -> anyhow::Result<CancelFlag> {
    let flag = CancelFlag::new();
    let set = flag.clone();
    // The handler runs on a thread of its own, not in the signal, so that it may print.
    ctrlc::set_handler(move || {
        if set.cancel() {
            std::process::exit(i32::from(EXIT_CODE));
        }
        output::note("stopping after a checkpoint; interrupt again to stop at once");
    })?;
    Ok(flag)
}
