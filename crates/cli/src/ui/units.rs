//! Numbers for people.

use std::time::Duration;

/// Bytes with three digits and a decimal unit: `98.4 MB`.
pub(crate) fn bytes(bytes: u64) -> String {
    scaled(bytes, &[" B", " kB", " MB", " GB", " TB", " PB", " EB"])
}

/// A count with three digits: `135 M`.
pub(crate) fn count(count: u64) -> String {
    scaled(count, &["", " K", " M", " B", " T", " Q", " Qi"])
}

fn scaled(value: u64, units: &[&str; 7]) -> String {
    if value < 1000 {
        return format!("{value}{}", units[0]);
    }
    let mut scaled = value as f64;
    let mut unit = 0;
    // 999.5 would be printed as 1000.
    while scaled >= 999.5 {
        scaled /= 1000.0;
        unit += 1;
    }
    let decimals = if scaled < 9.995 { 2 } else { usize::from(scaled < 99.95) };
    format!("{scaled:.decimals$}{}", units[unit])
}

/// A rate with three digits or so: `1234`, `94.2`, `6.91`.
pub(crate) fn rate(per_second: f64) -> String {
    match per_second {
        r if r >= 99.95 => format!("{r:.0}"),
        r if r >= 9.995 => format!("{r:.1}"),
        r => format!("{r:.2}"),
    }
}

/// A duration: `850 ms`, `12.3 s`, `4 min 05 s`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if seconds < 0.9995 {
        format!("{:.0} ms", seconds * 1000.0)
    } else if seconds < 99.95 {
        format!("{seconds:.1} s")
    } else {
        let seconds = seconds.round() as u64;
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits() {
        for (value, expected) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (98_362_432, "98.4 MB"),
            (999_499, "999 kB"),
            (999_500, "1.00 MB"),
            (1_117_320_768, "1.12 GB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
        assert_eq!(count(134_515_008), "135 M");
        assert_eq!(rate(94.23), "94.2");
        assert_eq!(duration(Duration::from_millis(850)), "850 ms");
        assert_eq!(duration(Duration::from_millis(12_340)), "12.3 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
    }
}
