//! Names as users give them, turned into folders and files; an observer hears of downloads.

use std::path::{Path, PathBuf};

use super::{Event, Observer};
use crate::error::Result;
use crate::formats::hub::{self, News, Want};

/// As [`hub::folder`].
///
/// # Errors
/// As there.
pub fn folder(given: &Path, want: Want, observer: &mut dyn Observer) -> Result<PathBuf> {
    hub::folder(given, want, &mut |news| tell(observer, news))
}

/// As [`hub::data`].
///
/// # Errors
/// As there.
pub fn data(given: &Path, observer: &mut dyn Observer) -> Result<Vec<PathBuf>> {
    hub::data(given, &mut |news| tell(observer, news))
}

/// A downloaded file is a phase whose steps are MiB.
fn tell(observer: &mut dyn Observer, news: News) {
    const MIB: u64 = 1 << 20;
    let event = match news {
        News::File { name, bytes } => Event::Phase {
            name: format!("Downloading {name} in MiB"),
            steps: bytes.div_ceil(MIB),
            done: 0,
        },
        News::Bytes(bytes) => Event::Progress { done: bytes / MIB },
        News::Stale(what) => Event::Warning(what.to_owned()),
    };
    observer.on_event(&event);
}
