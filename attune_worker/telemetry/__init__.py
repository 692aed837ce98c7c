"""What has the fleet seen of each model, in counters that are added to and never grow with the calls?"""
