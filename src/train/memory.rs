//! How much memory there is for this process: the least of the machine's and of what its control
//! groups (a container's or a job's) allow.

use std::fs;
use std::path::Path;

/// Memory that this process can still get, in bytes, where the system says so.
pub fn available_memory() -> Option<u64> {
    let [_, available] = memory(|file| fs::read_to_string(file).ok())?;
    Some(available)
}

/// Memory that this process may use in all, in bytes, where the system says so.
pub fn total_memory() -> Option<u64> {
    let [total, _] = memory(|file| fs::read_to_string(file).ok())?;
    Some(total)
}

/// Where a version of control groups keeps a group's limit and what the group uses.
struct Controller {
    root: &'static str,
    limit: &'static str,
    used: &'static str,
}

const V1: Controller = Controller {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
};
const V2: Controller = Controller {
    root: "/sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
};

/// Bytes in all and those that are available, from the text of the system's files.
fn memory(read: impl Fn(&Path) -> Option<String>) -> Option<[u64; 2]> {
    let machine = read(Path::new("/proc/meminfo"))?;
    let kib = |name| field(&machine, name)?.checked_mul(1024);
    let mut least = [kib("MemTotal:")?, kib("MemAvailable:")?];
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    for line in groups.lines() {
        // The number of the hierarchy, its controllers, the group's path in it.
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else {
            continue;
        };
        let controller = match controllers {
            "" => V2,
            names if names.split(',').any(|name| name == "memory") => V1,
            _ => continue,
        };
        // The limits of the groups around it hold too. In a container the path may be the host's:
        // then the last of these, the root, is what the container sees.
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            let dir = Path::new(controller.root).join(group);
            if let Some(allowed) = allowed(&controller, &dir, &read) {
                least = [0, 1].map(|i| least[i].min(allowed[i]));
            }
        }
    }
    Some(least)
}

/// The same of one group; nothing where it has no limit.
fn allowed(
    controller: &Controller,
    dir: &Path,
    read: &impl Fn(&Path) -> Option<String>,
) -> Option<[u64; 2]> {
    let number = |name| read(&dir.join(name))?.trim().parse::<u64>().ok();
    let limit = number(controller.limit)?;
    let used = number(controller.used).unwrap_or(0);
    // Pages of files count as used, but make room for others.
    let stat = read(&dir.join("memory.stat")).unwrap_or_default();
    let pages = ["inactive_file", "active_file"].map(|name| field(&stat, name).unwrap_or(0));
    let used = used.saturating_sub(pages[0].saturating_add(pages[1]));
    Some([limit, limit.saturating_sub(used)])
}

/// The number after a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let number = (words.next() == Some(name)).then(|| words.next())?;
        number?.parse().ok()
    };
    text.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: (&str, &str) = (
        "/proc/meminfo",
        "MemTotal:  64 kB\nMemFree: 1 kB\nMemAvailable:  48 kB\n",
    );

    fn memory_of(files: &[(&str, &str)]) -> Option<[u64; 2]> {
        memory(|path| {
            let file = files.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(file.1.to_owned())
        })
    }

    #[test]
    fn without_groups_or_limits_it_is_the_machines() {
        let unlimited = [
            MACHINE,
            ("/proc/self/cgroup", "0::/user.slice/a b:c\n"),
            ("/sys/fs/cgroup/user.slice/a b:c/memory.max", "max\n"),
            ("/sys/fs/cgroup/user.slice/a b:c/memory.current", "999\n"),
        ];
        assert_eq!(memory_of(&[MACHINE]), Some([64 << 10, 48 << 10]));
        assert_eq!(memory_of(&unlimited), Some([64 << 10, 48 << 10]));
        assert_eq!(memory_of(&unlimited[1..]), None);
    }

    #[test]
    fn the_tightest_group_around_the_process_counts_and_pages_of_files_are_no_use_of_it() {
        let found = memory_of(&[
            MACHINE,
            ("/proc/self/cgroup", "0::/jobs/7\n"),
            ("/sys/fs/cgroup/jobs/7/memory.max", "max\n"),
            ("/sys/fs/cgroup/jobs/memory.max", "20000\n"),
            ("/sys/fs/cgroup/jobs/memory.current", "15000\n"),
            (
                "/sys/fs/cgroup/jobs/memory.stat",
                "anon 7000\nfile 8000\ninactive_file 3000\nactive_file 1000\n",
            ),
        ]);
        assert_eq!(found, Some([20_000, 20_000 - (15_000 - 4_000)]));
    }

    #[test]
    fn a_container_of_the_first_version_sees_its_limit_at_the_root() {
        let found = memory_of(&[
            MACHINE,
            (
                "/proc/self/cgroup",
                "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n1:name=systemd:/\n",
            ),
            ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "30000\n"),
            ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "40000\n"),
        ]);
        assert_eq!(found, Some([30_000, 0]));
    }
}
