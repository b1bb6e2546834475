//! What the measurements ran on.

use bevel_kernels::Cpu;
use serde::Serialize;

/// The machine, as far as it tells.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Threads used.
    pub threads: usize,
    /// Instruction set used.
    pub isa: String,
    /// Bytes of memory; `None` where the system does not say.
    pub memory: Option<u64>,
    /// Operating system and architecture.
    pub system: String,
}

impl Machine {
    /// The machine this program runs on.
    pub fn new(cpu: &Cpu) -> Self {
        let name = field("/proc/cpuinfo", "model name").or_else(|| field("/proc/cpuinfo", "Model"));
        Self {
            cpu: name.unwrap_or_else(|| "unknown processor".to_owned()),
            threads: cpu.pool().threads(),
            isa: cpu.isa().to_string(),
            memory: kilobytes("/proc/meminfo", "MemTotal"),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        }
    }
}

/// The most memory this process has held at once, in bytes, file mappings counted; `None` where the
/// system does not say.
pub fn peak_memory() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM")
}

/// Bytes of memory that can be taken without taking them from anything else, within the limit of the
/// container, if there is one; `None` where the system does not say.
pub fn available_memory() -> Option<u64> {
    let free = kilobytes("/proc/meminfo", "MemAvailable")?;
    let number = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok();
    // The limit of a whole machine is "max", and the root of the groups has no such file.
    let limit = number("/sys/fs/cgroup/memory.max").zip(number("/sys/fs/cgroup/memory.current"));
    // Cached files are counted as used, and given up when memory is asked for.
    let cached = std::fs::read_to_string("/sys/fs/cgroup/memory.stat").ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("file "))?;
        line.trim().parse::<u64>().ok()
    });
    let left =
        limit.map(|(most, used)| most.saturating_sub(used.saturating_sub(cached.unwrap_or(0))));
    Some(left.map_or(free, |left| left.min(free)))
}

fn kilobytes(file: &str, name: &str) -> Option<u64> {
    let value = field(file, name)?;
    value.strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The value of the first line `name: value`.
fn field(file: &str, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}
