-- LEARN_LINES: how many tokens the prompt of a job had, and how many lines the module that it is about.
-- The sums fade with each job, so that their ratio follows the prompts of late. Not repeatable: one that arrives twice
-- counts twice, which moves a mean over hundreds of jobs by nothing that matters.
--
-- KEYS  1 auth lines: lines, tokens (faded sums), jobs (all that were counted)
-- ARGV  1 lines  2 tokens  3 half-life, in jobs
-- Returns how many jobs were counted
-- TTL   35 days
local LEAST, MOST = 1, 1000 -- tokens for each line that can be meant; as in learned_lines.py
local known = read(KEYS[1], 'lines', 'tokens', 'jobs')
local lines, tokens, jobs = number(known[1], nil), number(known[2], nil), number(known[3], nil)
if not (lines and tokens and jobs) or jobs < 0 or lines <= 0 or tokens < LEAST * lines or tokens > MOST * lines then
  lines, tokens, jobs = 0, 0, 0
end
local fading = 0.5 ^ (1 / tonumber(ARGV[3]))
jobs = math.min(math.floor(jobs) + 1, 2 ^ 53)
redis.call('HSET', KEYS[1],
  'lines', string.format('%.17g', lines * fading + tonumber(ARGV[1])),
  'tokens', string.format('%.17g', tokens * fading + tonumber(ARGV[2])),
  'jobs', integer(jobs))
redis.call('EXPIRE', KEYS[1], 3024000)
return jobs
