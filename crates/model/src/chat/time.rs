use std::time::{SystemTime, UNIX_EPOCH};

/// A moment of the Gregorian calendar, for templates that write the date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DateTime {
    /// 2026, say.
    pub year: i64,
    /// 1 to 12.
    pub month: u8,
    /// 1 to 31.
    pub day: u8,
    /// 0 to 23.
    pub hour: u8,
    /// 0 to 59.
    pub minute: u8,
    /// 0 to 59.
    pub second: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

const WEEKDAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl DateTime {
    /// The system's clock, in UTC.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::from_unix(i64::try_from(since.as_secs()).unwrap_or(0))
    }

    /// The moment `seconds` after 1970 began.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, second) = (seconds.div_euclid(86400), seconds.rem_euclid(86400));
        // Howard Hinnant's `civil_from_days`: years that begin in March, eras of 400 years.
        let days = days + 719_468;
        let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }

    /// Python's `strftime` in the C locale; `None` for a directive it does not know.
    pub(super) fn format(&self, format: &str) -> Option<String> {
        let mut text = String::new();
        let mut characters = format.chars();
        while let Some(character) = characters.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            let mut directive = characters.next()?;
            // GNU's flag for numbers without padding.
            let plain = directive == '-';
            if plain {
                directive = characters.next()?;
            }
            let two = |number: i64| if plain { number.to_string() } else { format!("{number:02}") };
            let hour12 = i64::from((self.hour + 11) % 12 + 1);
            let month = MONTHS[usize::from(self.month - 1) % 12];
            let weekday = WEEKDAYS[self.weekday()];
            text.push_str(&match directive {
                'Y' => self.year.to_string(),
                'y' => two(self.year.rem_euclid(100)),
                'm' => two(self.month.into()),
                'd' => two(self.day.into()),
                'e' => format!("{:2}", self.day),
                'H' => two(self.hour.into()),
                'I' => two(hour12),
                'M' => two(self.minute.into()),
                'S' => two(self.second.into()),
                'j' => {
                    let day = self.day_of_year();
                    if plain { day.to_string() } else { format!("{day:03}") }
                }
                'p' => if self.hour < 12 { "AM" } else { "PM" }.to_owned(),
                'B' => month.to_owned(),
                'b' | 'h' => month[..3].to_owned(),
                'A' => weekday.to_owned(),
                'a' => weekday[..3].to_owned(),
                'F' => self.format("%Y-%m-%d")?,
                'T' | 'X' => self.format("%H:%M:%S")?,
                'R' => self.format("%H:%M")?,
                'D' | 'x' => self.format("%m/%d/%y")?,
                'c' => self.format("%a %b %e %H:%M:%S %Y")?,
                // Python's naive times have no zone.
                'Z' | 'z' => String::new(),
                '%' => "%".to_owned(),
                'n' => "\n".to_owned(),
                't' => "\t".to_owned(),
                _ => return None,
            });
        }
        Some(text)
    }

    fn is_leap(&self) -> bool {
        self.year % 4 == 0 && (self.year % 100 != 0 || self.year % 400 == 0)
    }

    /// 1 on the first of January.
    fn day_of_year(&self) -> i64 {
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap = i64::from(self.month > 2 && self.is_leap());
        before[usize::from(self.month - 1) % 12] + i64::from(self.day) + leap
    }

    /// 0 on a Sunday.
    fn weekday(&self) -> usize {
        let years = self.year - 1;
        let days = years * 365 + years.div_euclid(4) - years.div_euclid(100)
            + years.div_euclid(400)
            + self.day_of_year();
        days.rem_euclid(7) as usize
    }
}
